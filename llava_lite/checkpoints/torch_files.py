"""Open checkpoints that other systems wrote with torch.save: a .pth file, or a directory of consolidated.*.pth.

Meta's LLaMA, LLaMA-Adapter V2, ImageBind-LLM and LLaMA2-Accessory. No code of a file is run: tensors, plain values
and the `argparse.Namespace` of a run's settings are read, anything else is refused. Weights are mapped, not copied,
but for those that were cut over several files.
"""

from __future__ import annotations

import hashlib
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from llava_lite.checkpoints.copying import readable
from llava_lite.formats import accessory, imagebind_llm, llama_adapter
from llava_lite.formats.meta_llama import DROPPED, our_name
from llava_lite.formats.meta_shards import add_difference, merge_shards
from llava_lite.hub.errors import readable_errors
from llava_lite.hub.json_files import read_fields
from llava_lite.hub.pickles import load_pickle

META = "meta_llama"
# How LLaMA2-Accessory spells a repository of the Hub, or a directory in one; a .pth file in one too.
ON_HUB = "hf://"
# Kind of checkpoint -> the module of formats that reads it, and the prefix of its LLaMA's names.
KINDS = {
    "llama_adapter": (llama_adapter, "llama."),
    "imagebind_llm": (imagebind_llm, "llama."),
    "accessory": (accessory, "llma."),
}
# Kind of file -> the names of the files of all ranks in a directory.
PATTERNS = {
    "meta": re.compile(r"consolidated\.(?P<rank>\d{2})\.pth"),
    "model": re.compile(r"consolidated\.(?P<rank>\d{2})-of-(?P<ranks>\d{2})\.model\.pth"),
    "difference": re.compile(r"consolidated\.(?P<rank>\d{2})-of-(?P<ranks>\d{2})\.model-diff\.pth"),
}
# Settings of the model beside the weights; where several state one, the last counts.
SETTINGS = ("params.json", "config.json")
META_FILE = "meta.json"
TOKENIZER = "tokenizer.model"
_DIGEST = re.compile(r"(?P<digest>[0-9a-f]{64})[-_].*\.pth")


class TorchCheckpoint(NamedTuple):
    """What was read: META or a key of KINDS, the fields of params.json, and the weights under their own names."""

    kind: str
    params: dict
    weights: dict[str, torch.Tensor]


def is_torch_checkpoint(path) -> bool:
    """Tell whether a path is a .pth file, or a directory of consolidated.*.pth."""
    path = Path(path)
    return (path.is_file() and path.suffix == ".pth") or (path.is_dir() and bool(find_shards(path)))


def read_torch_checkpoint(path, *more) -> TorchCheckpoint:
    """Read a checkpoint; of several, such as a base and an adapter, each on top of those before it.

    A weight that a later one holds replaces the earlier; one of Accessory's differences is added to it. Each is a path
    or `hf://user/name/...`. Raises OSError for a path that is no such checkpoint or lacks a file, ValueError for a
    broken file, one that holds code, and one of no known system.
    """
    kind, params, weights = META, {}, {}
    places = [local_copy(place) for place in (path, *more)]
    for place in places:
        params |= read_settings(place)
        form, state = read_weights_of(place)
        found = kind_of(state, place)
        if META not in (kind, found) and kind != found:
            raise ValueError(
                f"{str(place)!r} is of {found} and what it goes on is of {kind}. Give those of one system."
            )
        kind, before = (kind if found == META else found), kind
        weights, state = with_prefix(weights, before, kind), with_prefix(state, found, kind)
        if form == "difference" and not weights:
            raise ValueError(f"{str(place)!r} is a difference; give the model that it is added to before it.")
        weights = add_difference(weights, state) if form == "difference" else weights | state
    if kind == "accessory":
        check_stated_kind(places, accessory.kind_of(weights))
    return TorchCheckpoint(kind, params, weights)


def local_copy(path) -> Path:
    """Return a path as it is; for `hf://user/name[/directory][/x.pth]` the copy of its files in the Hub's cache.

    Only what belongs to such a checkpoint is fetched. Raises HubError, an OSError, where the Hub refuses.
    """
    if not str(path).startswith(ON_HUB):
        return Path(path)
    from huggingface_hub import snapshot_download

    user, _, rest = str(path).removeprefix(ON_HUB).strip("/").partition("/")
    name, _, inside = rest.partition("/")
    if not name:
        raise ValueError(f"{str(path)!r} names no repository; write {ON_HUB}user/name or {ON_HUB}user/name/directory.")
    files = ("consolidated.*.pth", *SETTINGS, META_FILE, TOKENIZER)
    wanted = [inside] if inside.endswith(".pth") else [f"{inside}/{file}".lstrip("/") for file in files]
    repository = f"{user}/{name}"
    with readable_errors(repository):
        return Path(snapshot_download(repository, allow_patterns=wanted)) / inside


def check_stated_kind(paths, kind: str) -> None:
    """Raise ValueError if the last meta.json, which many of Accessory's directories lack, states another kind."""
    files = [path / META_FILE for path in paths if (path / META_FILE).is_file()]
    stated = read_fields(files[-1]).get("llama_type") if files else None
    if not accessory.is_stated(stated, kind):
        raise ValueError(
            f"{str(files[-1])!r} says {stated!r} and the weights are of {kind!r}. Give those of one model."
        )


def with_prefix(state: Mapping, before: str, kind: str) -> dict:
    """Return Meta's weights under the names that they have in a checkpoint of another kind; others as they are."""
    prefix = KINDS[kind][1] if before == META and kind != META else ""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def kind_of(state: Mapping, path) -> str:
    """Return the kind of checkpoint that weights are of; ValueError for none that is known."""
    for kind, (module, _) in KINDS.items():
        if module.claims(state):
            return kind
    unknown = [name for name in state if our_name(name) is None and not name.endswith(DROPPED)]
    if unknown or not state:
        raise ValueError(
            f"{str(path)!r} holds {unknown[:4] or 'no weights'} ({len(state)} weights in all) and is of no system "
            f"that is known: {META}, {', '.join(KINDS)}."
        )
    return META


def read_weights_of(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return (the form of PATTERNS, the weights) of a .pth file, a form "model", or of a directory, ranks joined."""
    if path.is_dir():
        shards = find_shards(path)
        if not shards:
            raise OSError(f"{str(path)!r} holds no consolidated.*.pth. Name the directory that does, or a .pth file.")
        [(form, files)] = shards.items()
        return form, merge_shards([get_weights(read_torch_file(file), file) for file in files])
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give a .pth file or a directory of such.")
    return "model", get_weights(read_torch_file(path), path)


def get_weights(content, path) -> dict[str, torch.Tensor]:
    """Return the named tensors of a file: all of it, or what stands under "model"; ValueError for anything else."""
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__} and no named tensors. Name a file of weights.")
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(
            f"{str(path)!r} holds more than named tensors: {strange[:5]}. Name a file of weights, or one with them "
            'under "model".'
        )
    return dict(state)


def read_torch_file(path: Path):
    """Return what a .pth file holds, mapped; no code is run, and a sha256 in its name is checked.

    Raises ValueError for a file that is broken, cut short or another than its name says, or that holds code.
    """
    named = _DIGEST.fullmatch(path.name)
    if named is not None and get_digest(path) != named["digest"]:
        raise ValueError(f"{str(path)!r} is not the file whose sha256 is in its name. Copy it again.")
    # For the settings that runs of these systems put beside their weights; making one runs no code.
    with readable(path), torch.serialization.safe_globals([Namespace]):
        return load_pickle(path, mmap=True)


def get_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def read_settings(path: Path) -> dict:
    """Return what params.json, and Accessory's config.json, of a directory say; of a file, params.json beside it."""
    places = [path / name for name in SETTINGS] if path.is_dir() else [path.parent / SETTINGS[0]]
    found = [file for file in places if file.is_file()]
    return {key: value for file in found for key, value in read_fields(file).items()}


def find_shards(directory: Path) -> dict[str, list[Path]]:
    """Return {form: files in the order of ranks} of a directory, {} if it holds none.

    Raises OSError for the file of a rank that is missing, ValueError for files of several forms.
    """
    found: dict[str, dict[int, re.Match]] = {}
    for name in sorted(path.name for path in directory.iterdir()):
        for form, pattern in PATTERNS.items():
            if match := pattern.fullmatch(name):
                found.setdefault(form, {})[int(match["rank"])] = match
    if len(found) > 1:
        first, second = (next(iter(ranks.values()))[0] for ranks in list(found.values())[:2])
        raise ValueError(
            f"{str(directory)!r} holds files of two checkpoints, {first} and {second}. Keep those of one."
        )
    for ranks in found.values():
        last = next(reversed(ranks.values()))
        number = int(last.groupdict().get("ranks") or max(ranks) + 1)
        missing = sorted(set(range(number)) - set(ranks))
        if missing or len(ranks) > number:
            raise OSError(
                f"{str(directory)!r} has {len(ranks)} of the {number} files that {last[0]} is one of; those of ranks "
                f"{missing} are missing. Copy them beside it."
            )
    return {form: [directory / ranks[rank][0] for rank in sorted(ranks)] for form, ranks in found.items()}
