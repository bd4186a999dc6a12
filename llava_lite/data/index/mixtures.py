"""Read YAML files that mix files of records: LLaVA-NeXT's `datasets`, and LLaMA-Adapter's and Accessory's `META`."""

import os
from typing import NamedTuple

from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.recipes import RECIPES
from llava_lite.hub.yaml_files import UnreadableYAML, read_yaml
from llava_lite.output_file import can_be_named

DATASET_KEYS = ("json_path", "sampling_strategy", "image_folder")
META_KEYS = ("path", "type", "preprocess", "prompt_type", "root", "ratio")
# Accessory's names of prompts -> our templates, which may be named as well. YAML reads None as a text.
PROMPT_TYPES = {"shortqa": "alpaca_short", "qg": "question_generation", "None": "bare"}
PROMPT_TYPES |= {name: name for name in ("alpaca", "alpaca_short", "question_generation", "caption", "bare")}


class Entry(NamedTuple):
    """A file of a mixture.

    sampling: as in sample_positions. group: its records never share a batch with those of another. template: its own
    conversation template. recipe: a key of RECIPES.
    """

    path: str
    image_folder: str | None
    sampling: str = "all"
    group: str | None = None
    template: str | None = None
    recipe: str | None = None


def read_mixture(path: str, image_folder: str | None = None) -> list[Entry]:
    """Return the files of a YAML mixture; paths are relative to the working directory, else to the YAML file.

    image_folder: for entries without their own. Raises DataError with the entry and what is known.
    """
    try:
        mixture = read_yaml(path)
    except UnreadableYAML as error:
        raise DataError(str(error)) from None
    found = [key for key in ("datasets", "META") if isinstance(mixture, dict) and mixture.get(key)]
    if len(found) != 1 or not isinstance(mixture[found[0]], list):
        raise DataError(
            f"{path}: expected a list `datasets` of {{json_path, sampling_strategy, image_folder}}, or a list `META` "
            "of paths or of {path, type, preprocess, prompt_type, root, ratio}."
        )
    read = {"datasets": _dataset, "META": _meta}[found[0]]
    return [read(entry, path, image_folder) for entry in mixture[found[0]]]


def _dataset(entry, mixture_path: str, image_folder: str | None) -> Entry:
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str) or set(entry) - set(DATASET_KEYS):
        known = ", ".join(DATASET_KEYS)
        raise DataError(f"{mixture_path}: entry {repr(entry)[:200]} of `datasets`; expected the keys {known}.")
    name = f"{mixture_path}: entry {repr(entry)[:200]} of `datasets`"
    sampling, directory = entry.get("sampling_strategy", "all"), entry.get("image_folder")
    # A ratio, of META, has other bounds.
    if not isinstance(sampling, str) or sampling.strip().startswith("ratio:"):
        found = describe(sampling)
        raise DataError(f"{name}: sampling_strategy is {found}, expected all, first:N, end:N or random:N (N or N%).")
    path = _beside(_path(entry["json_path"], "json_path", name), mixture_path)
    directory = image_folder if directory is None else _path(directory, "image_folder", name)
    return Entry(path, directory, sampling.strip())


def _meta(entry, mixture_path: str, image_folder: str | None) -> Entry:
    """Return an entry of META: a path (LLaMA-Adapter, ImageBind-LLM) or an object (LLaMA2-Accessory)."""
    if isinstance(entry, str):
        return Entry(_beside(entry, mixture_path), image_folder)
    name = f"{mixture_path}: entry {repr(entry)[:200]} of `META`"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - set(META_KEYS):
        raise DataError(f"{name}; expected a path, or the keys {', '.join(META_KEYS)}.")
    group, root = entry.get("type"), entry.get("root")
    if group is not None and not isinstance(group, str):
        raise DataError(f"{name}: type is {group!r}, expected a text.")
    template = None
    if "prompt_type" in entry:
        template = _known(str(entry["prompt_type"]), PROMPT_TYPES, "prompt_type", name)
    recipe = entry.get("preprocess")
    if recipe is not None:
        _known(str(recipe), RECIPES, "preprocess", name)
    directory = image_folder if root is None else _root(_path(root, "root", name), image_folder)
    path = _beside(_path(entry["path"], "path", name), mixture_path)
    return Entry(path, directory, _sampling(entry, name), group, template, recipe)


def _path(value, key: str, name: str) -> str:
    """Return the value of a key that names a file or a directory; DataError for one that cannot."""
    if not isinstance(value, str):
        advice = "" if isinstance(value, (dict, list)) else " in quotes"
        raise DataError(f"{name}: {key} is {describe(value)}, expected a path{advice}.")
    if not can_be_named(value):
        raise DataError(f"{name}: {key} is {describe(value)}, expected a path, and no file can have this name.")
    return value


def _known(value: str, known: dict, key: str, name: str):
    if value not in known:
        raise DataError(f"{name}: unknown {key} {value!r}; known: {', '.join(known)}.")
    return known[value]


def _sampling(entry: dict, name: str) -> str:
    ratio = entry.get("ratio", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise DataError(f"{name}: ratio is {ratio!r}, expected a fraction of the records above 0, up to 1.")
    return f"ratio:{ratio!r}" if "ratio" in entry else "all"


def _beside(path: str, mixture_path: str) -> str:
    beside = os.path.join(os.path.dirname(mixture_path), path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def _root(root: str, image_folder: str | None) -> str:
    """Return the directory of the images of an entry: as it is written, or below the image folder of the run."""
    below = None if image_folder is None else os.path.join(image_folder, root)
    return below if below is not None and not os.path.isdir(root) and os.path.isdir(below) else root
