"""Run FlagPerf's case on its data directory: stage 1, stage 2, MMMU; or read the logs of a run that has ended."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llava_lite.train.flagperf.config import VendorConfig
from llava_lite.train.flagperf.report import Case, Stage
from llava_lite.train.monitor.log_lines import METRICS, read_metrics

# Beside the two directories of checkpoints, in Output.
TIMES = "flagperf.json"
MODELS = {"7b": "vicuna-7b-v1.5", "13b": "vicuna-13b-v1.5"}
SOURCES = {
    "checkpoints": "huggingface.co/lmsys/{model}",
    "tower": "huggingface.co/openai/clip-vit-large-patch14-336",
    "blip_laion_cc_sbu_558k.json": "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "llava_v1_5_mix665k.json": "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    "mmmu": "huggingface.co/datasets/MMMU/MMMU",
}


@dataclass(frozen=True)
class Layout:
    """The paths of FlagPerf's data directory."""

    root: Path
    size: str
    config: VendorConfig

    @property
    def model(self) -> Path:
        """The language model."""
        return self.root / "LLaVA-Pretrain" / "checkpoints" / MODELS[self.size]

    @property
    def tower(self) -> Path:
        """The vision tower."""
        return self.root / "LLaVA-Pretrain" / "checkpoints" / "openai" / "clip-vit-large-patch14-336"

    @property
    def pretrained(self) -> Path:
        """Where stage 1 saves."""
        return self.root / "Output" / "checkpoints_pretrain" / f"llava-v1.5-{self.size}"

    @property
    def finetuned(self) -> Path:
        """Where stage 2 saves."""
        return self.root / self.config.output_dir_finetune

    @property
    def mmmu(self) -> Path:
        """The tables of MMMU."""
        return self.root / self.config.mmmu_data_path

    @property
    def times(self) -> Path:
        """The seconds that both stages took, for --from_log."""
        return self.root / "Output" / TIMES

    def check(self) -> None:
        """Raise FileNotFoundError with all that is missing and where to get it."""
        needed = {
            self.model: SOURCES["checkpoints"].format(model=f"{self.model.name}"),
            self.tower: SOURCES["tower"],
            self.root / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json": SOURCES["blip_laion_cc_sbu_558k.json"],
            self.root / "LLaVA-Finetune" / "llava_v1_5_mix665k.json": SOURCES["llava_v1_5_mix665k.json"],
            self.mmmu: SOURCES["mmmu"],
        }
        missing = [f"  {path}    from {source}" for path, source in needed.items() if not path.exists()]
        if missing:
            raise FileNotFoundError(f"FlagPerf's case needs what is not in {self.root}:\n" + "\n".join(missing))


@dataclass(frozen=True)
class Launch:
    """How the stages are started.

    scripts: the directory of the recipes. num_chips: of all nodes. flags: of `llava-lite train`, for both stages.
    """

    scripts: Path
    num_chips: int
    flags: tuple[str, ...] = ()


def run_case(layout: Layout, launch: Launch, evaluate: Callable[[list[str]], Any]) -> Case:
    """Run both stages and MMMU; return what they took. ChildProcessError for a stage that fails.

    evaluate: what runs `llava-lite eval` with these words.
    """
    layout.check()
    for directory in (layout.pretrained, layout.finetuned):
        if (directory / METRICS).exists():
            raise FileExistsError(
                f"{directory} has the log of an earlier run, whose steps would be counted with the seconds of this "
                f"one. Move {layout.root / 'Output'} and {layout.finetuned} away, or read it with --from_log."
            )
    config, seconds = layout.config, {}
    common = {"DATA_ROOT": layout.root, "MODEL": layout.model, "VISION_TOWER": layout.tower}
    for name, script, variables, batch, accumulation in (
        (
            "pretrain",
            "pretrain.sh",
            {"OUTPUT": layout.pretrained},
            config.pretrain_per_device_train_batch_size,
            config.pretrain_gradient_accumulation_steps,
        ),
        (
            "finetune",
            "finetune.sh",
            {"OUTPUT": layout.finetuned, "PROJECTOR": layout.pretrained / "mm_projector.bin"},
            config.finetune_per_device_train_batch_size,
            config.finetune_gradient_accumulation_steps,
        ),
    ):
        flags = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        command = ["bash", str(launch.scripts / script), *flags, "--logging_steps", "1", *launch.flags]
        start_s = time.monotonic()
        start(name, command, common | variables)
        seconds[name] = time.monotonic() - start_s
        write_times(layout, launch, seconds)
    # As FlagPerf asks.
    more = ("--variant", "flagperf", "--model", layout.finetuned, "--data", layout.mmmu, "--out", mmmu_out(layout))
    evaluate(["mmmu", *map(str, more)])
    return read_case(layout)


def start(what: str, command: Sequence[str], variables: dict[str, Any]) -> None:
    """Run a command to its end; ChildProcessError with its name if it fails."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise ChildProcessError(f"{what} ended with exit code {done.returncode}; its messages are above.")


def mmmu_out(layout: Layout) -> Path:
    """Return the directory of MMMU's answers and scores."""
    return layout.root / "Output" / "mmmu"


def write_times(layout: Layout, launch: Launch, seconds: dict[str, float]) -> None:
    """Keep what no log of a stage says."""
    layout.times.parent.mkdir(parents=True, exist_ok=True)
    kept = {"seconds": seconds, "num_chips": launch.num_chips, "config": asdict(layout.config)}
    layout.times.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read_case(layout: Layout) -> Case:
    """Return the case of a run that has ended, from its logs."""
    if not layout.times.is_file():
        raise FileNotFoundError(f"there is no {layout.times}; run the case first, without --from_log.")
    kept = json.loads(layout.times.read_text(encoding="utf-8"))
    differing = [name for name, value in asdict(layout.config).items() if kept["config"].get(name) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the run in {layout.root} had another config: {name} was {kept['config'].get(name)!r} and is "
            f"{getattr(layout.config, name)!r} now. Name the config of the run."
        )
    stages = []
    for name, directory in (("pretrain", layout.pretrained), ("finetune", layout.finetuned)):
        if name not in kept["seconds"]:
            raise ValueError(f"{layout.times} has no time of the stage {name}; that run did not end.")
        stages.append(read_stage(directory / METRICS, kept["seconds"][name], kept["num_chips"]))
    results = mmmu_out(layout) / "results.json"
    score = json.loads(results.read_text(encoding="utf-8"))["score"] / 100 if results.is_file() else None
    counted = count_parameters(layout.finetuned)
    return Case(layout.size, layout.config.theoryflops, kept["num_chips"], tuple(stages), counted, score)


def read_stage(path: Path, seconds: float, num_chips: int) -> Stage:
    """Return what a stage took, from its metrics.jsonl and the seconds of its process."""
    lines = [line for line in read_metrics(path) if "tokens_per_s" in line]
    if not lines or "padded_tokens" not in lines[0]:
        raise ValueError(f"{path} has no line with the tokens of a step; it is not the log of such a run.")
    step_seconds = sum(line["tokens"] / line["tokens_per_s"] for line in lines) / num_chips
    totals = {name: sum(line[name] for line in lines) for name in ("records", "tokens", "padded_tokens")}
    return Stage(seconds, step_seconds=step_seconds, **totals)


def count_parameters(directory: Path) -> int:
    """Return the number of parameters of a saved model without its vision tower."""
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if "vision_tower" not in name]  # noqa: SIM118
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total
