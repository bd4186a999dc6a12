"""List the files of a finished directory when it is written, and name one later that is missing, cut or changed."""

from pathlib import Path

from safetensors import safe_open

from llava_lite.checkpoints.copying import readable
from llava_lite.checkpoints.files import ADAPTER, ADAPTER_WEIGHTS, COMPLETE, PICKLED, SAFE, TRAINED, find_weight_files
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.hub.card import CARD
from llava_lite.hub.errors import CONFIG
from llava_lite.hub.json_files import read_fields
from llava_lite.hub.pickles import check_unpacked_size
from llava_lite.train.saving import manifest as paper

FILES = "final_files.json"


def write_list(directory: Path) -> None:
    """Write the names, sizes and SHA-256 of a directory's files into FILES."""
    paper.write_json(directory / FILES, paper.digests(directory, paper.list_files(directory)))


def find_damage(directory: Path) -> str | None:
    """Return the sentence for a finished directory that has lost or changed a file; None if all are as written.

    Every byte is read. A directory of an earlier version, which has no list of them, is judged by its weights alone.
    """
    written = read_list(directory)
    if written is None:
        return find_lost_weights(directory)
    # The card is edited by hand, and nothing is opened from it.
    names = [name for name in written if name != CARD]
    for name in names:
        path, num_bytes = directory / name, written[name]["size"]
        if not path.is_file():
            return f"{name} of the finished run in {directory} is missing."
        if (found := path.stat().st_size) != num_bytes and not is_edited(path):
            return f"{name} of the finished run in {directory} has {found:,} bytes, and {num_bytes:,} were written."
    for name, found in paper.digests(directory, [name for name in names if written[name]["sha256"]]).items():
        if found["sha256"] != written[name]["sha256"] and not is_edited(directory / name):
            return f"{name} of the finished run in {directory} is not as it was written (its SHA-256 is another)."
    return None


def read_list(directory: Path) -> dict[str, dict] | None:
    """Return what `write_list` wrote, by name; None where there is no such list, or a damaged one."""
    try:
        # A FIFO would never end.
        written = read_fields(directory / FILES) if (directory / FILES).is_file() else {}
    except (OSError, ValueError):
        return None
    # At first a list had sizes alone.
    sizes = {name: facts.get("size") if isinstance(facts, dict) else facts for name, facts in written.items()}
    is_list = all(type(size) is int for size in sizes.values()) and all(map(lies_inside, written))
    hashes = {name: facts.get("sha256") for name, facts in written.items() if isinstance(facts, dict)}
    return {name: {"size": sizes[name], "sha256": hashes.get(name)} for name in sizes} if sizes and is_list else None


def lies_inside(name: str) -> bool:
    """Tell whether a name of the list is one that `write_list` writes, and leads nowhere else."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and name.isprintable()


def is_edited(path: Path) -> bool:
    """Tell whether a file that is not as written is JSON that was changed by hand: no cut JSON can be read."""
    try:
        return path.suffix == ".json" and bool(read_fields(path))
    except (OSError, ValueError):
        return False


def find_lost_weights(directory: Path) -> str | None:
    """Return the sentence for a finished directory without its config or weights, or with a cut file of weights."""
    if not (directory / CONFIG).is_file():
        return f"{CONFIG} of the finished run in {directory} is missing."
    checkpoint, lost = Checkpoint(directory), f"of the finished run in {directory} is missing."
    try:
        files = [file for name in (SAFE, PICKLED) for file in find_weight_files(checkpoint, name)]
        parts = [file for name in (*TRAINED, *ADAPTER_WEIGHTS) if (file := checkpoint.file(name))]
        if checkpoint.named_base is None and not files:
            return f"{COMPLETE[0]} {lost}"
        if not files and not parts:
            return f"{TRAINED[0]} {lost}"
        if checkpoint.file(ADAPTER) and not any(map(checkpoint.has, ADAPTER_WEIGHTS)):
            return f"{ADAPTER_WEIGHTS[0]} {lost}"
        for file in (*files, *parts):
            check_whole(Path(file))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check_whole(file: Path) -> None:
    """Raise ValueError for a file of weights that is cut, by its header or its table of contents alone."""
    with readable(file):
        if file.suffix != ".safetensors":
            check_unpacked_size(file)
            return
        # It compares the sizes in the header with that of the file.
        with safe_open(file, framework="pt"):
            pass
