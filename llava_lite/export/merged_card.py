"""Turn what was merged, and how it answered, into the card of the whole model: its own, not that of the run before."""

from __future__ import annotations

from pathlib import Path

CARD = "README.md"
# Of the card of the run that trained the parts: what still is true of the weights, and tells how they came about.
KEPT_METADATA = ("license", "license_name", "license_link", "datasets", "base_model")
KEPT_SECTIONS = ("Data", "What trained", "Losses", "Expert load", "Recipe")


def merged_card(name: str, source: str, folder, base: str, config, adapter: dict, checked: str) -> str:
    """Return the text of README.md for a merged model.

    name: of its directory. source, base: path or hub id of what was trained, and of what it stood on; folder: where
    the former lies. config: of the merged model. adapter: adapter_config.json of the source, {} where it holds no
    LoRA. checked: how its answers compare with those of the parts.
    """
    metadata, sections = read_card(Path(folder) / CARD)
    sees = getattr(config, "has_vision_tower", False)
    front = {
        "library_name": "llava-lite" if hasattr(config, "has_vision_tower") else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["llava", "multimodal", "merged"] if sees else ["merged"],
        **{key: metadata[key] for key in KEPT_METADATA if key in metadata},
    }
    if "base_model" in front:
        front["base_model_relation"] = "finetune"
    origin = public(source)
    lines = [
        f"# {name}",
        "",
        f"`{origin}` and its base `{public(base)}` as one model, written by `llava-lite merge`.",
        "",
        *facts(config, adapter, checked, sees),
        "",
        *usage(name, sees),
    ]
    trained = [f"### {title}\n\n{body}" for title, body in sections.items() if title in KEPT_SECTIONS]
    text = "\n".join(lines)
    if trained:
        text += "\n\n" + "\n\n".join([f"## How `{origin}` was trained", *trained])
    return f"{front_matter(front)}\n{text}\n"


def front_matter(fields: dict) -> str:
    """Return the YAML block that the Hub reads."""
    import yaml

    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def facts(config, adapter: dict, checked: str, sees: bool) -> list[str]:
    """Return what the model is and what was done, a line each."""
    lines = []
    if adapter:
        lines.append(f"- merged: LoRA of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}")
    else:
        lines.append("- merged: the weights that were trained")
    if sees:
        tower = config.mm_vision_tower or config.vision_config.model_type
        lines += [f"- vision tower: `{public(tower)}`", f"- connector: `{config.mm_projector_type}`"]
    if getattr(config, "conv_template", None):
        lines.append(f"- prompt format: `{config.conv_template}`")
    return [*lines, f"- this directory holds the whole model; beside its parts: {checked}"]


def usage(name: str, sees: bool) -> list[str]:
    """Return how to ask it something."""
    question = 'reply(model, processor, "What is in this image?", images="image.jpg")'
    question = question if sees else 'reply(model, processor, "Who are you?")'
    code = ["from llava_lite import load, reply", "", f'model, processor = load("{name}")', f"print({question})"]
    return ["## Use", "", "```python", *code, "```"]


def public(name: str) -> str:
    """Return a hub id as it is, and of a path of this machine the last part."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() or str(name).startswith((".", "~")) else str(name)


def read_card(path: Path) -> tuple[dict, dict]:
    """Return (metadata, {title: text} of the sections) of a card, both empty where there is none."""
    import yaml

    if not path.is_file():
        return {}, {}
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    except yaml.YAMLError:
        metadata = {}
    sections = {}
    for section in parts[-1].split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        sections[title.strip()] = body.strip()
    return metadata if isinstance(metadata, dict) else {}, sections
