"""Write the card of a merged model: its parts, the parity check, and the sections of the training run's card."""

from __future__ import annotations

from pathlib import Path

from llava_lite.hub.card import CARD, front_matter, public_name, read_front_matter, usage

# Parts of the training run's card that are still true of the merged weights.
KEPT_METADATA = ("license", "license_name", "license_link", "datasets", "base_model")
KEPT_SECTIONS = ("Data", "What trained", "Losses", "Expert load", "Recipe")


def merged_card(name: str, source: str, directory, base: str, config, adapter: dict, checked: str) -> str:
    """Return the text of README.md for a merged model.

    name: of its directory. source, base: path or hub id of the trained weights and of their base; directory: the local
    copy of the source. config: of the merged model. adapter: adapter_config.json of the source, {} without LoRA.
    checked: how its answers compare with those of the parts.
    """
    metadata, sections = read_card(Path(directory) / CARD)
    sees = getattr(config, "has_vision_tower", False)
    front = {
        "library_name": "llava-lite" if hasattr(config, "has_vision_tower") else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["llava", "multimodal", "merged"] if sees else ["merged"],
        **{key: metadata[key] for key in KEPT_METADATA if key in metadata},
    }
    if "base_model" in front:
        front["base_model_relation"] = "finetune"
    origin = public_name(source)
    lines = [
        f"# {name}",
        "",
        f"`{origin}` and its base `{public_name(base)}` as one model, written by `llava-lite merge`.",
        "",
        *facts(config, adapter, checked, sees),
        "",
        usage(name, sees),
    ]
    trained = [f"### {title}\n\n{body}" for title, body in sections.items() if title in KEPT_SECTIONS]
    text = "\n".join(lines)
    if trained:
        text += "\n\n" + "\n\n".join([f"## How `{origin}` was trained", *trained])
    return f"{front_matter(front)}\n{text}\n"


def facts(config, adapter: dict, checked: str, sees: bool) -> list[str]:
    """Return the lines about the model and the merge."""
    lines = []
    if adapter:
        lines.append(f"- merged: LoRA of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}")
    else:
        lines.append("- merged: the weights that were trained")
    if sees:
        tower = config.mm_vision_tower or config.vision_config.model_type
        lines += [f"- vision tower: `{public_name(tower)}`", f"- connector: `{config.mm_projector_type}`"]
    if getattr(config, "conv_template", None):
        lines.append(f"- prompt format: `{config.conv_template}`")
    return [*lines, f"- this directory holds the complete model; compared with its parts: {checked}"]


def read_card(path: Path) -> tuple[dict, dict]:
    """Return (metadata, {title: text} of the sections) of a card, both empty where there is none."""
    if not path.is_file():
        return {}, {}
    metadata, body = read_front_matter(path)
    sections = {}
    for section in body.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        sections[title.strip()] = text.strip()
    return metadata, sections
