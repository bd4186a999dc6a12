"""Train some steps of every stage with two checkouts and compare losses, gradient norms and weights.

    git worktree add ../before COMMIT
    python -m benchmarks.same_numbers --before ../before [--steps 20] [--tolerance 1e-6]

For a change that must not change numbers. Both train the tiny world of the quickstart with the recipes' settings, in
one CPU process with the same seed; the third stage is run once more with LoRA in place of experts. Exits with 1 if a
loss differs by more than the tolerance; prints which weights are bit-equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "--per_device_train_batch_size 16 --logging_steps 1 --save_strategy no --bf16 False --use_cpu True --seed 0 "
    "--model_max_length 512 --max_grad_norm 0 --gradient_checkpointing False --report_to none --disable_tqdm True"
)
CONVERSATIONS = "--version v1 --image_aspect_ratio pad --group_by_modality_length True"
EXPERTS = (
    "--moe_enable True --moe_mode sparse --num_experts 4 --top_k_experts 2 --capacity_factor 1.5 "
    "--train_modules gate_proj up_proj down_proj wg"
)


def stages(world: Path, out: Path) -> dict[str, list[str]]:
    """Return {stage: flags}; each stands on what the one before left in `out`."""
    tiny, finetune = ROOT / "playground" / "tiny", world / "LLaVA-Finetune"
    tower = f"--vision_tower {tiny / 'tower'} --mm_projector_type mlp2x_gelu"
    records = f"--data_path {finetune / 'llava_v1_5_mix665k.json'} --image_folder {finetune / 'data'}"
    captions = world / "LLaVA-Pretrain"
    moe = world / "MoE-LLaVA"
    projector = f"--pretrain_mm_mlp_adapter {out / 'stage1' / 'mm_projector.bin'}"
    flags = {
        "stage1": f"--model_name_or_path {tiny / 'llm'} {tower} --tune_mm_mlp_adapter True --version plain "
        f"--data_path {captions / 'blip_laion_cc_sbu_558k.json'} --image_folder {captions / 'images'} "
        "--learning_rate 3e-3",
        "stage2": f"--model_name_or_path {tiny / 'llm'} {tower} {projector} {CONVERSATIONS} {records} "
        "--learning_rate 1.5e-3",
        "stage3": f"--model_name_or_path {out / 'stage2'} {EXPERTS} {CONVERSATIONS} "
        f"--data_path {moe / 'ft_json/llava_image_tune_.json'} {moe / 'ft_json/nlp_tune.json'} --image_folder {moe} "
        "--learning_rate 7e-4",
        "LoRA": f"--model_name_or_path {out / 'stage2'} --lora_enable True --lora_r 8 --lora_alpha 16 "
        f"{CONVERSATIONS} {records} --learning_rate 1e-3",
    }
    return {stage: f"{text} {COMMON} --output_dir {out / stage}".split() for stage, text in flags.items()}


def run(tree: Path, module: str, *arguments: str, threads: int = 1) -> None:
    """Run a module of a checkout in its own process; raise with what it printed if it fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} of {tree} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def read_log(directory: Path) -> list[dict]:
    """Return the lines of metrics.jsonl that hold the loss of a step."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def compare(before: Path, after: Path) -> tuple[float, float, int, int]:
    """Return the largest differences of losses and of gradient norms, and how many of the weights are bit-equal."""
    logs = [read_log(before), read_log(after)]
    if len(logs[0]) != len(logs[1]):
        raise RuntimeError(f"{before} logged {len(logs[0])} steps and {after} {len(logs[1])}.")
    loss, norm = (
        max(abs(one[key] - other[key]) for one, other in zip(*logs, strict=True) if key in one)
        for key in ("loss", "grad_norm")
    )
    files = sorted(path.name for path in before.glob("*.safetensors"))
    weights = [
        {name: tensor for file in files for name, tensor in load_file(path / file).items()} for path in (before, after)
    ]
    equal = sum(name in weights[1] and tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    return loss, norm, equal, len(weights[0])


def main(argv=None) -> int:
    """Print a line for each stage; return 1 if a loss differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare this one with")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps a stage (default: 20)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference of a loss (default: 1e-6)")
    args = parser.parse_args(argv)
    trees = {"before": args.before.resolve(), "after": ROOT}
    worst = 0.0
    with TemporaryDirectory() as scratch:
        world = Path(scratch, "world")
        run(ROOT, "playground.tiny.make_world", "--out", str(world), "--scale", "0.05")
        for stage in stages(world, Path(scratch)):
            for name, tree in trees.items():
                flags = stages(world, Path(scratch, name))[stage]
                run(tree, "llava_lite.train.train", *flags, "--max_steps", str(args.steps))
            loss, norm, equal, total = compare(Path(scratch, "before", stage), Path(scratch, "after", stage))
            worst = max(worst, loss)
            print(
                f"{stage:7} loss {loss:.1e}  gradient norm {norm:.1e}  {equal} of {total} tensors bit-equal",
                flush=True,
            )
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
