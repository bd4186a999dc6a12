"""Turn a folder that is being written into one with its name, once what it answers has been found right."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from llava_lite.export import witness
from llava_lite.hub import in_words
from llava_lite.model.quantization import kind_of, stored_quantization

# Of a logit, in float32: sums over thousands of products, taken in another order.
TOLERANCE = 1e-3


def check_full_precision(path, base=None):
    """Raise ValueError if the weights of a checkpoint, or of the base it stands on, are in 4 or 8 bits."""
    stored = stored_quantization(path, base, {})
    if stored is not None:
        raise ValueError(
            f"{str(base or path)!r} holds {kind_of(stored)} weights, which cannot be written in another layout or "
            "changed without loss. Start from the weights in full precision"
            f"{': give them as the base (--model-base)' if base else ''}."
        )


def refuse_full(target):
    """Raise ValueError if the target is anything but a new or empty folder."""
    path = Path(target)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(target)!r} is there already and not empty; give the name of a new folder.")


def unchecked(target) -> Path:
    """Return the folder that is written before it has been checked, beside the target."""
    return Path(f"{str(target).rstrip('/')}.unchecked")


def start_folder(target) -> Path:
    """Return a new, empty folder to write into."""
    shutil.rmtree(unchecked(target), ignore_errors=True)
    unchecked(target).mkdir(parents=True)
    return unchecked(target)


@contextmanager
def removed_on_error(folder):
    """Remove a folder that could not be written to its end; one that was is worth a look even if it is wrong."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def finish_folder(target, expected, found, tolerance, say) -> witness.Difference:
    """Give what was written its name if it answers as expected; ValueError otherwise, and it stays where it is."""
    gap = witness.difference(expected, found)
    say(gap.report())
    if not gap.passes(tolerance):
        raise ValueError(
            f"what was written does not answer as its source does ({gap.report()}; tolerance {tolerance:g}). "
            f"It is left in {str(unchecked(target))!r} for a look."
        )
    Path(target).mkdir(parents=True, exist_ok=True)
    os.rmdir(target)
    os.replace(unchecked(target), target)
    say(f"{target}: written and checked.")
    return gap


def push(folder, repo_id) -> str:
    """Upload a folder to the Hub; return the address of the commit."""
    from huggingface_hub import HfApi

    with in_words(repo_id):
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload model"))
