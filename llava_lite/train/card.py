"""Turn a finished run into a model card: what it was made of, how, and what came out."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llava_lite.train.origins import datasets_of, hub_base, licence_of

PACKAGES = ("llava-lite", "torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers", "safetensors")
# Where a run's files lie, who may read them and how its progress is shown say nothing about the model.
PRIVATE = re.compile(
    r"(^|_)(dir|token|run_name|resume_from_checkpoint|local_rank|hub_\w+|report_to|project|disable_tqdm|debug|pin_memory)$"
    r"|^trackio"
)
PLAIN = (bool, int, float, str, list, tuple, dict)
_NUM_LOSS_ROWS = 8
_STAGES = {
    "projector": "the connector alone (LLaVA's stage 1)",
    "full": "connector and language model (LLaVA's stage 2)",
    "lora": "low-rank updates of the language model, and the connector (LLaVA's stage 2 with LoRA)",
    "moe": "experts, router and connector (MoE-LLaVA's stage 3)",
}


@dataclass(frozen=True)
class RunFacts:
    """What a card tells. Paths are cut to their last part when the card is written.

    data: (file, number of samples) pairs. trained, frozen: parameters by part of the model. log: the lines of
    metrics.jsonl. settings: flags that differ from their defaults. whole: the folder holds every weight. plots: names
    of pictures beside the card.
    """

    name: str
    base: str
    tuning: str
    conv_template: str | None = None
    tower: str | None = None
    connector: str | None = None
    data: Sequence[tuple[str, int]] = ()
    trained: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)
    log: Sequence[Mapping] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    world_size: int = 1
    whole: bool = True
    plots: Sequence[str] = ()

    @property
    def expert_load(self) -> Mapping[str, Sequence[float]]:
        """Shares of all choices by layer, [E] each, at the last line of the log that has them."""
        last = next((line["experts"] for line in reversed(self.log) if "experts" in line), {})
        return {layer: report["load"] for layer, report in last.items()}


def card_of_run(trainer, model_args, data_args, whole: bool) -> str:
    """Return the card of a finished run; `trainer` is a LLaVATrainer."""
    from llava_lite.train.run_log import METRICS, read_metrics
    from llava_lite.train.tuning import table_rows

    args, config = trainer.args, trainer.unwrapped.config
    rows = table_rows(trainer.model, args)
    return write_card(
        RunFacts(
            name=os.path.abspath(args.output_dir),
            base=model_args.model_name_or_path,
            tuning=args.tuning,
            conv_template=model_args.version,
            tower=config.mm_vision_tower,
            connector=config.mm_projector_type if config.has_vision_tower else None,
            data=trainer.train_dataset.sources,
            trained={part: row["trained"] for part, row in rows.items()},
            frozen={part: row["frozen"] for part, row in rows.items()},
            log=read_metrics(Path(args.output_dir) / METRICS),
            settings=settings_of(model_args, data_args, args),
            world_size=args.world_size,
            whole=whole,
            plots=sorted(path.name for path in Path(args.output_dir).glob("*.png")),
        )
    )


def public_name(value):
    """Return a setting as a reader elsewhere may see it: of a path on this machine only the last part."""
    if isinstance(value, dict):
        return {key: public_name(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_name(item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text = os.path.expanduser(str(value)).replace("\\", "/")
    is_local = text.startswith(("/", ".")) or re.match(r"[A-Za-z]:/", text) or os.path.exists(text)
    return text.rstrip("/").rsplit("/", 1)[-1] if "/" in text and is_local else str(value)


def settings_of(*arguments) -> dict:
    """Return the fields of argument dataclasses that differ from their defaults, without private ones."""
    settings = {}
    for dataclass_args in arguments:
        for knob in dataclasses.fields(dataclass_args):
            value = getattr(dataclass_args, knob.name)
            made = knob.default_factory() if callable(knob.default_factory) else knob.default
            value = getattr(value, "value", value)
            if value != made and isinstance(value, PLAIN) and not PRIVATE.search(knob.name) and knob.init:
                settings[knob.name] = value
    return settings


def write_card(facts: RunFacts) -> str:
    """Return the text of README.md: YAML front matter, then sections; those without facts are left out."""
    sections = [
        f"# {public_name(facts.name)}",
        introduction(facts),
        usage(facts),
        "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in facts.plots),
        section("Data", table(("file", "samples"), [(public_name(file), f"{num:,}") for file, num in facts.data])),
        section("What trained", parameters(facts)),
        section("Losses", losses(facts.log)),
        section("Expert load", expert_table(facts.expert_load)),
        section("Recipe", recipe(facts)),
        section("Versions", table(("package", "version"), versions())),
    ]
    return front_matter(facts) + "\n" + "\n\n".join(part for part in sections if part) + "\n"


def front_matter(facts: RunFacts) -> str:
    """Return the YAML block that the Hub reads."""
    import yaml

    metadata = {
        # Not "transformers": the lines that the Hub would then show do not know the class.
        "library_name": "llava-lite",
        "pipeline_tag": "image-text-to-text" if facts.tower else "text-generation",
        "tags": ["llava", "multimodal", facts.tuning] if facts.tower else ["llava", facts.tuning],
    }
    metadata |= licence_of(facts.base)
    if datasets := datasets_of(facts.data):
        metadata["datasets"] = datasets
    if base := hub_base(facts.base):
        is_adapter = facts.tuning == "lora" and not facts.whole
        metadata |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n"


def introduction(facts: RunFacts) -> str:
    """Return what it is, in a few lines."""
    lines = [f"- base: {linked(facts.base)}"]
    lines += [f"- vision tower: {linked(facts.tower)}"] if facts.tower else []
    lines += [f"- connector: `{facts.connector}`"] if facts.connector else []
    lines += [f"- prompt format: `{facts.conv_template}`"] if facts.conv_template else []
    lines += [f"- trained: {_STAGES.get(facts.tuning, facts.tuning)}"]
    held = "the whole model" if facts.whole else "what was trained; the base is opened with it"
    return "\n".join([*lines, f"- this folder holds {held}"])


def linked(name: str) -> str:
    """Return a hub id as a link, a local folder by its last part."""
    return f"[{name}](https://huggingface.co/{name})" if hub_base(name) == name else f"`{public_name(name)}`"


def usage(facts: RunFacts) -> str:
    """Return how to ask it something."""
    picture = ', images="picture.jpg"' if facts.tower else ""
    question = "What is in this picture?" if facts.tower else "Who are you?"
    code = [
        "from llava_lite import load, reply",
        "",
        # A push writes the name of its repository here.
        f'model, processor = load("{public_name(facts.name)}")',
        f'print(reply(model, processor, "{question}"{picture}))',
    ]
    return section("Use", "\n".join(["```python", *code, "```"]))


def section(title: str, body: str) -> str:
    """Return a section, "" without a body."""
    return f"## {title}\n\n{body}" if body else ""


def table(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    """Return a Markdown table, "" without rows."""
    rows = list(rows)
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def parameters(facts: RunFacts) -> str:
    """Return the table of trained and frozen parameters."""
    parts = list(dict.fromkeys([*facts.trained, *facts.frozen]))
    rows = [(part, facts.trained.get(part, 0), facts.frozen.get(part, 0)) for part in parts]
    rows += [("all", sum(row[1] for row in rows), sum(row[2] for row in rows))] if rows else []
    return table(("part", "trained", "frozen"), [(part, f"{yes:,}", f"{no:,}") for part, yes, no in rows])


def losses(log: Sequence[Mapping]) -> str:
    """Return evenly spread lines of the training log, first and last among them, and every evaluation."""
    trained = [line for line in log if "loss" in line]
    count = min(_NUM_LOSS_ROWS, len(trained))
    picked = [trained[round(i * (len(trained) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = [(line["step"], number(line["loss"]), "") for line in picked]
    rows += [(line["step"], "", number(line["eval_loss"])) for line in log if "eval_loss" in line]
    means = [f"Mean over the run: {number(line['train_loss'])}." for line in log if "train_loss" in line]
    return "\n\n".join(filter(None, [*means[-1:], table(("step", "loss", "evaluation"), sorted(rows))]))


def number(value) -> str:
    """Return a loss; one that was not finite is text in the log already."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def expert_table(load: Mapping[str, Sequence[float]]) -> str:
    """Return each expert's share of the choices, layer by layer."""
    width = max(map(len, load.values()), default=0)
    shares = {layer: [f"{share:.1%}" for share in row] + [""] * (width - len(row)) for layer, row in load.items()}
    return table(("layer", *(f"expert {i}" for i in range(width))), [(layer, *row) for layer, row in shares.items()])


def recipe(facts: RunFacts) -> str:
    """Return the flags that differ from their defaults."""
    flags = [(f"`--{key}`", shown(value)) for key, value in sorted(facts.settings.items())]
    return table(("flag", "value"), [("ranks", facts.world_size), *flags])


def shown(value) -> str:
    """Return a setting as it would be typed."""
    value = public_name(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def versions() -> list[tuple[str, str]]:
    """Return the installed versions of what the run used."""
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
