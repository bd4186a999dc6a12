"""The parts of a model card that all of this package's cards share: the block that the Hub reads, and the usage."""

from __future__ import annotations

import os
from pathlib import Path

from llava_lite.hub.yaml_files import LARGEST_BYTES, UnreadableYAML, parse_yaml

CARD = "README.md"


def front_matter(fields: dict) -> str:
    """Return the YAML block that the Hub reads."""
    import yaml

    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def usage(name: str, sees: bool) -> str:
    """Return the section that shows how to ask the model; sees: whether it reads images."""
    image = ', images="image.jpg"' if sees else ""
    question = "What is in this image?" if sees else "Who are you?"
    code = [
        "from llava_lite import load, reply",
        "",
        # A push replaces the name by that of its repository, see push.OPENED.
        f'model, processor = load("{name}")',
        f'print(reply(model, processor, "{question}"{image}))',
    ]
    return "\n".join(["## Use", "", "```python", *code, "```"])


def public_name(name) -> str:
    """Return a hub id as it is, and of a local path the last part."""
    text = os.path.expanduser(str(name))
    is_local = os.path.isabs(text) or os.path.exists(text) or text.startswith(".")
    return Path(text).name if is_local else str(name)


def read_front_matter(path) -> tuple[dict, str]:
    """Return (metadata, the text after it) of a card, {} for metadata that cannot be read."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(LARGEST_BYTES)
    before, *parts = text.split("---\n", 2)
    if before or len(parts) != 2:
        return {}, text
    try:
        metadata = parse_yaml(parts[0], path)
    except UnreadableYAML:
        metadata = {}
    return metadata if isinstance(metadata, dict) else {}, parts[1]
