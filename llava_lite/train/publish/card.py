"""Turn a finished run into a model card: what it was made of, how, and what came out."""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llava_lite.hub.card import CARD, front_matter, read_front_matter, usage

PACKAGES = ("llava-lite", "torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers", "safetensors")
# Paths, tokens and progress bars are no facts of the model.
PRIVATE = re.compile(
    r"(^|_)(dir|token|run_name|resume_from_checkpoint|local_rank|hub_\w+|report_to|project|disable_tqdm|debug|pin_memory)$"
    r"|^trackio"
)
PLAIN = (bool, int, float, str, list, tuple, dict)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Annotation files of LLaVA-1.5 and their numbers of records, to the data set on the Hub.
PUBLISHED = {
    ("blip_laion_cc_sbu_558k.json", 558128): "liuhaotian/LLaVA-Pretrain",
    ("llava_v1_5_mix665k.json", 665298): "liuhaotian/LLaVA-Instruct-150K",
}
_NUM_LOSS_ROWS = 8
STAGES = {
    "projector": "the connector alone (LLaVA's stage 1)",
    "full": "connector and language model (LLaVA's stage 2)",
    "lora": "low-rank updates of the language model, and the connector (LLaVA's stage 2 with LoRA)",
    "moe": "experts, router and connector (MoE-LLaVA's stage 3)",
    "prompts": "prompts, gates and connector (LLaMA-Adapter V2's first phase)",
    "bias_norm": "norms and biases of the language model (LLaMA-Adapter V2's second phase)",
}


@dataclass(frozen=True)
class RunFacts:
    """The facts on a card. Paths are cut to their last part when the card is written.

    data: (file, number of samples) pairs. weights: numbers of parameters by part of the model, "trained" and "frozen".
    log: the lines of metrics.jsonl. settings: flags that differ from their defaults. full: the directory holds every
    weight. plots: names of images beside the card.
    """

    name: str
    base: str
    tuning: str
    conv_template: str | None = None
    tower: str | None = None
    connector: str | None = None
    data: Sequence[tuple[str, int]] = ()
    weights: Mapping[str, Mapping] = field(default_factory=dict)
    log: Sequence[Mapping] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    world_size: int = 1
    full: bool = True
    plots: Sequence[str] = ()

    @property
    def expert_load(self) -> Mapping[str, Sequence[float]]:
        """Fractions of all assignments by layer, [E] each, from the last line of the log that has them."""
        last = next((line["experts"] for line in reversed(self.log) if "experts" in line), {})
        return {layer: report["load"] for layer, report in last.items()}


def make_card(trainer, model_args, data_args, full: bool) -> str:
    """Return the card of a finished run; `trainer` is a LLaVATrainer."""
    from llava_lite.train.monitor.log_lines import METRICS, read_metrics
    from llava_lite.train.tuning import table_rows

    args, config = trainer.args, trainer.unwrapped.config
    return write_card(
        RunFacts(
            name=os.path.abspath(args.output_dir),
            base=model_args.model_name_or_path,
            tuning=args.tuning,
            conv_template=model_args.version,
            tower=config.mm_vision_tower,
            connector=config.mm_projector_type if config.has_vision_tower else None,
            data=trainer.train_dataset.sources,
            weights=table_rows(trainer.model, args),
            log=read_metrics(Path(args.output_dir) / METRICS),
            settings=get_settings(model_args, data_args, args),
            world_size=args.world_size,
            full=full,
            plots=sorted(path.name for path in Path(args.output_dir).glob("*.png")),
        )
    )


def public_name(value):
    """Return a setting for publication: of a path on this machine only the last part."""
    if isinstance(value, dict):
        return {key: public_name(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_name(item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text = os.path.expanduser(str(value)).replace("\\", "/")
    is_local = text.startswith(("/", ".")) or re.match(r"[A-Za-z]:/", text) or os.path.exists(text)
    return text.rstrip("/").rsplit("/", 1)[-1] if "/" in text and is_local else str(value)


def get_settings(*arguments) -> dict:
    """Return the fields of argument dataclasses that differ from their defaults, without private ones."""
    settings = {}
    for dataclass_args in arguments:
        for knob in fields(dataclass_args):
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
        usage(public_name(facts.name), bool(facts.tower)),
        "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in facts.plots),
        section("Data", table(("file", "samples"), [(public_name(file), f"{num:,}") for file, num in facts.data])),
        section("What trained", parameters(facts)),
        section("Losses", losses(facts.log)),
        section("Expert load", expert_table(facts.expert_load)),
        section("Recipe", recipe(facts)),
        section("Versions", table(("package", "version"), versions())),
    ]
    return front_matter(metadata(facts)) + "\n" + "\n\n".join(part for part in sections if part) + "\n"


def metadata(facts: RunFacts) -> dict:
    """Return the fields that the Hub reads."""
    fields = {
        # Not "transformers": the code that the Hub would then show does not know the class.
        "library_name": "llava-lite",
        "pipeline_tag": "image-text-to-text" if facts.tower else "text-generation",
        "tags": ["llava", "multimodal", facts.tuning] if facts.tower else ["llava", facts.tuning],
    }
    fields |= get_licence(facts.base)
    if datasets := get_datasets(facts.data):
        fields["datasets"] = datasets
    if base := hub_base(facts.base):
        is_adapter = facts.tuning == "lora" and not facts.full
        fields |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return fields


def introduction(facts: RunFacts) -> str:
    """Return the list of what the model is made of."""
    lines = [f"- base: {linked(facts.base)}"]
    lines += [f"- vision tower: {linked(facts.tower)}"] if facts.tower else []
    lines += [f"- connector: `{facts.connector}`"] if facts.connector else []
    lines += [f"- conversation template: `{facts.conv_template}`"] if facts.conv_template else []
    lines += [f"- trained: {STAGES.get(facts.tuning, facts.tuning)}"]
    held = "the full model" if facts.full else "the trained weights; the base is opened with them"
    return "\n".join([*lines, f"- this directory holds {held}"])


def linked(name: str) -> str:
    """Return a hub id as a link, a local directory by its last part."""
    return f"[{name}](https://huggingface.co/{name})" if hub_base(name) == name else f"`{public_name(name)}`"


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
    rows = [(part, row["trained"], row["frozen"]) for part, row in facts.weights.items()]
    rows += [("all", sum(row[1] for row in rows), sum(row[2] for row in rows))] if rows else []
    return table(("part", "trained", "frozen"), [(part, f"{yes:,}", f"{no:,}") for part, yes, no in rows])


def losses(log: Sequence[Mapping]) -> str:
    """Return evenly spaced lines of the training log, the first and the last included, and every evaluation."""
    trained = [line for line in log if "loss" in line]
    count = min(_NUM_LOSS_ROWS, len(trained))
    picked = [trained[round(i * (len(trained) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = [(line["step"], number(line["loss"]), "") for line in picked]
    rows += [(line["step"], "", number(line["eval_loss"])) for line in log if "eval_loss" in line]
    means = [f"Mean over the run: {number(line['train_loss'])}." for line in log if "train_loss" in line]
    return "\n\n".join(filter(None, [*means[-1:], table(("step", "loss", "evaluation"), sorted(rows))]))


def number(value) -> str:
    """Return a loss as text; one that is not finite is text in the log already."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def expert_table(load: Mapping[str, Sequence[float]]) -> str:
    """Return each expert's fraction of the assignments, layer by layer."""
    width = max(map(len, load.values()), default=0)
    cells = {layer: [f"{part:.1%}" for part in row] + [""] * (width - len(row)) for layer, row in load.items()}
    return table(("layer", *(f"expert {i}" for i in range(width))), [(layer, *row) for layer, row in cells.items()])


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


# What the Hub knows of a base and of data files.


def is_hub_id(name: str) -> bool:
    """Tell whether a name is that of a repository, and no directory or bare word."""
    return not os.path.exists(name) and _HUB_ID.fullmatch(name) is not None


def hub_base(base: str) -> str | None:
    """Return the hub id of a base: itself, or the one that the card of a local stage names; None if unknown."""
    if is_hub_id(base):
        return base
    found = card_metadata(base).get("base_model")
    return found if isinstance(found, str) else None


def card_metadata(base: str) -> dict:
    """Return the metadata of a base's card: the one in a directory, or of a hub id the cached one."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(base, CARD) if is_hub_id(base) else os.path.join(base, CARD)
    return read_front_matter(card)[0] if isinstance(card, str) and os.path.isfile(card) else {}


def get_licence(base: str) -> dict:
    """Return the licence that a base's card names, which the trained model inherits; {} where none is known."""
    known = card_metadata(base)
    return {
        key: known[key] for key in ("license", "license_name", "license_link") if known.get("license") and key in known
    }


def get_datasets(data: Sequence[tuple[str, int]]) -> list[str]:
    """Return the published data sets among (file, samples) pairs: by name and number of records."""
    return [PUBLISHED[os.path.basename(file), num] for file, num in data if (os.path.basename(file), num) in PUBLISHED]
