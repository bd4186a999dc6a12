"""Write the model that a base and its published differences make: `llava-lite apply-delta BASE DELTA OUT`.

Open-Chinese-LLaMA is published so, since LLaMA's licence lets nobody pass its weights on. Sums are taken in float32
and written in float16. One copy of the model is in memory; base and delta are mapped.
"""

import json
import shutil
from pathlib import Path

import torch

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.torch_files import META, TOKENIZER, is_torch_checkpoint, read_torch_checkpoint
from llava_lite.export.hf_directory import save_weights
from llava_lite.export.verified_directory import check_empty, give_name, new_directory
from llava_lite.formats.meta_shards import apply_delta
from llava_lite.hub.errors import CONFIG

PARAMS, WEIGHTS = "params.json", "consolidated.00.pth"
# Of Hugging Face's layout.
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
HF_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")


def apply_delta_to(base, delta, out, report=print):
    """Write base + delta to the directory `out`, in the layout of both. report: called with each line.

    Raises ValueError for two layouts, for weights that one side lacks, and for a directory that is not empty.
    """
    check_empty(out)
    is_meta = [is_torch_checkpoint(path) for path in (base, delta)]
    if any(is_meta) and not all(is_meta):
        in_meta, in_hf = (base, delta) if is_meta[0] else (delta, base)
        raise ValueError(
            f"{str(in_meta)!r} is in Meta's layout and {str(in_hf)!r} is not. Give both in one; Hugging Face's "
            "names and order of weights are others."
        )
    with new_directory(out) as unchecked:
        written = write_meta(base, delta, unchecked) if all(is_meta) else write_hf(base, delta, unchecked)
    give_name(out)
    report(f"wrote {written} to {out}")


def write_meta(base, delta, directory) -> str:
    """Write consolidated.00.pth, params.json and tokenizer.model; return what was written, in words.

    The tokenizer is the delta's, else the base's, which Meta's directories hold one above.
    """
    models = [read_torch_checkpoint(path) for path in (base, delta)]
    for path, model in zip((base, delta), models, strict=True):
        if model.kind != META:
            raise ValueError(f"{str(path)!r} is of {model.kind} and no plain LLaMA; a delta is added to a base alone.")
    weights = apply_delta(models[0].weights, models[1].weights)
    torch.save(weights, directory / WEIGHTS)
    folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in (delta, base)]
    copied = copy_first(PARAMS, folders, directory)
    copied += copy_first(TOKENIZER, [folders[0], folders[1], folders[1].absolute().parent], directory)
    without = "" if TOKENIZER in copied else f"; no {TOKENIZER} was found, copy it beside them"
    return f"{describe(weights)}: {', '.join([WEIGHTS, *copied])}{without}"


def write_hf(base, delta, directory) -> str:
    """Write safetensors, config.json and the tokenizer's files; return what was written, in words."""
    checkpoints = [Checkpoint(path) for path in (base, delta)]
    for checkpoint in checkpoints:
        checkpoint.check()
    weights = apply_delta(*(checkpoint.weights() for checkpoint in checkpoints))
    save_weights(weights, directory, "5GB")
    fields = (checkpoints[1].fields or checkpoints[0].fields) | {"dtype": "float16", "torch_dtype": "float16"}
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    source = next((one for one in reversed(checkpoints) if any(map(one.has, TOKENIZER_FILES))), checkpoints[0])
    for name in HF_FILES:
        if source.file(name) is not None:
            shutil.copyfile(source.file(name), directory / name)
    return f"{describe(weights)}: {', '.join(sorted(path.name for path in directory.iterdir()))}"


def copy_first(name: str, folders, target: Path) -> list[str]:
    """Copy the first file of a name that one of several directories has; return [name], or [] if none has it."""
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        return []
    shutil.copyfile(found, target / name)
    return [name]


def describe(weights) -> str:
    """Return how many weights there are, and of how many numbers."""
    return f"{len(weights)} weights, {sum(w.numel() for w in weights.values()):,} numbers in float16"
