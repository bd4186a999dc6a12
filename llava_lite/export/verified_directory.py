"""Turn a directory that is being written into one with its name, once what it answers has been found right."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_lite.checkpoints.config import is_llava
from llava_lite.export import verify
from llava_lite.hub.push import push_directory
from llava_lite.inference import load
from llava_lite.model.quantization import get_quantization_kind, stored_quantization

# Of a logit, in float32: sums over thousands of products, taken in another order.
TOLERANCE = 1e-3


def check_full_precision(checkpoint):
    """Raise ValueError if the weights of a checkpoint, or of the base it stands on, are in 4 or 8 bits."""
    stored, base = stored_quantization(checkpoint), checkpoint.base
    if stored is not None:
        raise ValueError(
            f"{str(base or checkpoint)!r} holds {get_quantization_kind(stored)} weights, which cannot be written in "
            "another layout or changed without loss. Start from the weights in full precision"
            f"{': give them as the base (--model-base)' if base else ''}."
        )


def check_empty(target):
    """Raise ValueError if the target is anything but a new or empty directory."""
    path = Path(target)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(target)!r} is there already and not empty; give the name of a new directory.")


def unchecked(target) -> Path:
    """Return the directory that is written before it has been checked, beside the target."""
    return Path(f"{str(target).rstrip('/')}.unchecked")


@contextmanager
def new_directory(target) -> Iterator[Path]:
    """Give an empty directory beside the target to write into.

    It is removed if it could not be written completely; a complete one is kept, even if it is wrong.
    """
    directory = unchecked(target)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def finish_directory(target, expected, found, tolerance, report) -> verify.Difference:
    """Give what was written its name if it answers as expected; ValueError otherwise, and it stays where it is."""
    gap = verify.difference(expected, found)
    report(gap.report())
    if not gap.passes(tolerance):
        raise ValueError(
            f"what was written does not answer as its source does ({gap.report()}; tolerance {tolerance:g}). "
            f"It is kept in {str(unchecked(target))!r} for inspection."
        )
    give_name(target)
    report(f"{target}: written and checked.")
    return gap


def give_name(target) -> None:
    """Move what was written beside the target, a new or empty directory, into its place."""
    Path(target).mkdir(parents=True, exist_ok=True)
    os.rmdir(target)
    os.replace(unchecked(target), target)


def push(directory, repo_id: str | None, report) -> None:
    """Upload a directory to the Hub and report the address of the commit; None for no upload."""
    if repo_id is not None:
        report(str(push_directory(directory, repo_id).commit_url))


def get_our_answers(directory) -> list[verify.Answer | None]:
    """Return what a directory answers through this package, in float32."""
    model, processor = load(directory, device="cpu", dtype="float32")
    return verify.answers(model.eval(), verify.readings(processor, sees(model)), processor.image_token_index)


def sees(model) -> bool:
    """Tell whether a model has a vision tower."""
    return is_llava(model.config) and model.config.has_vision_tower
