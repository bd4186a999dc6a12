"""Turn the names of a run's base and data files into what the Hub knows of them: ids, licence, published data sets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Annotation files of LLaVA-1.5 and their numbers of records, to the data set on the Hub.
PUBLISHED = {
    ("blip_laion_cc_sbu_558k.json", 558128): "liuhaotian/LLaVA-Pretrain",
    ("llava_v1_5_mix665k.json", 665298): "liuhaotian/LLaVA-Instruct-150K",
}


def is_hub_id(name: str) -> bool:
    """Tell the name of a repository from a folder, there or gone, and from a bare word."""
    return not os.path.exists(name) and _HUB_ID.fullmatch(name) is not None


def hub_base(base: str) -> str | None:
    """Return the hub id that a base goes back to: itself, or what the card of a local stage names; None if unknown."""
    if is_hub_id(base):
        return base
    found = card_metadata(base).get("base_model")
    return found if isinstance(found, str) else None


def card_metadata(base: str) -> dict:
    """Return what the card of a base says to the Hub: a folder's own, of a hub id what the cache holds of it."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    card = Path(base) / "README.md"
    if is_hub_id(base):
        cached = try_to_load_from_cache(base, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    front = card.read_text(encoding="utf-8").split("---\n") if card.is_file() else []
    try:
        found = yaml.safe_load(front[1]) if len(front) > 2 else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def licence_of(base: str) -> dict:
    """Return the licence that a base's card names, which what is made from it inherits; {} where none is known."""
    known = card_metadata(base)
    return {
        key: known[key] for key in ("license", "license_name", "license_link") if known.get("license") and key in known
    }


def datasets_of(data: Sequence[tuple[str, int]]) -> list[str]:
    """Return the published data sets among (file, samples) pairs: by name and number, as a name proves nothing."""
    return [PUBLISHED[os.path.basename(file), num] for file, num in data if (os.path.basename(file), num) in PUBLISHED]
