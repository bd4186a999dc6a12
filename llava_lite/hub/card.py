"""The parts of a model card that all of this package's cards share: the block that the Hub reads, and the usage."""

from __future__ import annotations

import os
from pathlib import Path

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
