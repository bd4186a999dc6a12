"""The manifest of a checkpoint-N: which files it has, their sizes and SHA-256, and a SHA-256 of the manifest itself.

A manifest has one spelling, the one that `write_manifest` writes, so any changed byte of the file is found. Manifests
of earlier versions have neither "format" nor "sha256". Every other key is an error, and so is one of the two without
the other: removing or damaging one field does not turn a manifest into one of an earlier version. None of this stops
someone who writes a manifest of their own.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath

MANIFEST = "manifest.json"
# Beside a manifest.json that cannot be read they tell a checkpoint-N from what another program wrote.
ONLY_OF_A_RUN = ("trained.safetensors", "trainer_state.json", "latest")
FORMAT = 2
# What every version writes; "steps" and "schedule" are the settings of the run.
CONTENT = {"step": int, "world_size": int, "serial": int, "steps": dict, "schedule": dict, "files": dict}
SEAL = {"format", "sha256"}
# A manifest has some 200 bytes a file and the names of the trained weights.
MAX_BYTES = 1 << 28
# One thread hashes 0.5 to 2 GB/s and releases the GIL; few disks are faster than four of them.
_HASHING_THREADS = 4
_CHECKPOINT = re.compile(r"(?:tmp-)?checkpoint-(\d+)(?:-replaced)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not what was written; `file` is the first wrong one, `reason` what is wrong with it."""

    def __init__(self, directory: str | Path, file: str, reason: str):
        self.directory, self.file, self.reason = Path(directory), file, reason
        super().__init__(f"{directory} is not complete: {file} {reason}.")


class WrongContent(ValueError):
    """What is wrong inside a manifest."""


def list_files(directory: str | Path) -> list[str]:
    """Return the files under `directory` in sorted order, as relative paths; the manifest itself is left out."""
    root = Path(directory)
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def get_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digests(directory: str | Path, names: Sequence[str]) -> dict[str, dict]:
    """Return {name: {"size": bytes, "sha256": hex}} of the named files, several hashed at a time."""
    root = Path(directory)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: get_sha256(root / name), names))
    sizes = [(root / name).stat().st_size for name in names]
    return {n: {"size": size, "sha256": sha256} for n, size, sha256 in zip(names, sizes, hashes, strict=True)}


def seal(content: dict) -> dict:
    """Return the content of a manifest with its format and its checksum."""
    content = {key: value for key, value in content.items() if key != "sha256"} | {"format": FORMAT}
    return content | {"sha256": hashlib.sha256(to_text(content).encode()).hexdigest()}


def to_text(content: dict) -> str:
    """Return the one spelling of a manifest; ValueError for a number that JSON lacks."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(directory: str | Path) -> dict:
    """Return the manifest of a checkpoint; raises BrokenCheckpoint for one that is missing, damaged or malformed."""
    path = Path(directory) / MANIFEST
    try:
        if not Path(directory).is_dir():
            reason = "is no directory" if os.path.lexists(directory) else "does not exist"
            raise BrokenCheckpoint(directory, "the directory", reason)
        # A FIFO would never end.
        if not path.is_file():
            raise BrokenCheckpoint(directory, MANIFEST, "is no file" if os.path.lexists(path) else "is missing")
        if path.stat().st_size > MAX_BYTES:
            raise WrongContent(f"{path.stat().st_size:,} bytes, no manifest has more than {MAX_BYTES:,}")
        text = path.read_bytes().decode("utf-8")
        # Python's own message about the parsing names line and column.
        manifest = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        check_content(manifest, text)
        check_step(directory, manifest["step"])
        return manifest
    except RecursionError:
        raise BrokenCheckpoint(directory, MANIFEST, "cannot be read (it is nested too deeply)") from None
    except OSError as error:
        raise BrokenCheckpoint(directory, MANIFEST, f"cannot be read ({error.strerror or error})") from error
    except BrokenCheckpoint:
        raise
    except ValueError as error:
        raise BrokenCheckpoint(directory, MANIFEST, f"cannot be read ({error})") from error


def _without_duplicates(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise WrongContent(f"it has two values for {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _refuse_constant(name: str):
    raise WrongContent(f"it holds {name}, which is no number of JSON")


def check_content(manifest, text: str) -> None:
    """Raise WrongContent for anything but a manifest as it was written, which is `text`."""
    if not isinstance(manifest, dict):
        raise WrongContent(f"it holds a {type(manifest).__name__} and no fields")
    if missing := sorted(CONTENT.keys() - manifest.keys()):
        raise WrongContent(f"it has no {missing[0]!r}")
    if unknown := sorted(manifest.keys() - CONTENT.keys() - SEAL):
        raise WrongContent(f"it has the unknown field {unknown[0]!r}")
    for name, kind in CONTENT.items():
        if type(manifest[name]) is not kind:
            wanted = "a whole number" if kind is int else "a table"
            raise WrongContent(f"{name!r} is {manifest[name]!r:.60} and not {wanted}")
    if manifest.keys() & SEAL:
        check_seal(manifest, text)
    if manifest["step"] < 0 or manifest["serial"] < 0:
        raise WrongContent("its step or its serial number is negative")
    check_counts(manifest["steps"])
    check_files(manifest["files"])


def check_seal(manifest: dict, text: str) -> None:
    """Raise WrongContent for a manifest of another format, or one that is not as it was written."""
    if lost := sorted(SEAL - manifest.keys()):
        raise WrongContent(f"its field {lost[0]!r} is lost")
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        raise WrongContent(f"it has format {manifest['format']!r:.60}, this version reads {FORMAT}")
    if to_text(seal(manifest)) != text:
        raise WrongContent("its bytes are not those that were written (sha256 differs)")


def check_counts(steps: dict) -> None:
    """Raise WrongContent unless the settings of a run have a number of ranks, and counts that are counts."""
    for name in ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
        value = steps.get(name, None if name == "world_size" else 1)
        if type(value) is not int or value < 1:
            raise WrongContent(f"{name!r} of 'steps' is {value!r:.60} and no number from 1")


def check_files(files: dict) -> None:
    """Raise WrongContent for names that lead out of the directory, and entries without a size and a SHA-256."""
    if not files:
        raise WrongContent("it lists no file")
    for name, entry in files.items():
        if not is_inside(name) or name == MANIFEST:
            raise WrongContent(f"it lists the file {name!r:.120}, which cannot be one of the checkpoint's")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            raise WrongContent(f"its entry of {name!r:.120} is not a size and a sha256")
        if type(entry["size"]) is not int or entry["size"] < 0:
            raise WrongContent(f"the size of {name!r:.120} is {entry['size']!r:.60} and no number of bytes")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise WrongContent(f"the sha256 of {name!r:.120} is {entry['sha256']!r:.80} and not 64 hexadecimal digits")


def is_inside(name: str) -> bool:
    """Tell whether a name can only be that of a file below a directory, on every system."""
    path = PurePosixPath(name)
    is_plain = bool(name) and name.isprintable() and path.as_posix() == name and "\\" not in name
    return is_plain and not path.is_absolute() and not PureWindowsPath(name).drive and ".." not in path.parts


def get_step(directory: str | Path) -> int | None:
    """Return N of a directory named checkpoint-N, also while it is written; None for any other name."""
    match = _CHECKPOINT.fullmatch(Path(directory).name)
    return int(match.group(1)) if match else None


def check_step(directory: str | Path, step: int) -> None:
    """Raise WrongContent if a directory named checkpoint-N holds another step than N."""
    named = get_step(Path(directory).absolute())
    if named is not None and named != step:
        raise WrongContent(f"it is of step {step} and the directory is named after step {named}")


def verify(directory: str | Path, reads: Callable[[str], bool] = lambda name: True, hashes: bool = True) -> dict:
    """Compare a checkpoint with its manifest, all sizes before any content, and return the manifest.

    reads: name of a file -> whether it matters to the caller. hashes: False to compare the sizes alone. Raises
    BrokenCheckpoint with the first file that is missing or differs.
    """
    manifest, root = read_manifest(directory), Path(directory)
    names = sorted(filter(reads, manifest["files"]))
    try:
        for name in names:
            expected = manifest["files"][name]["size"]
            if not (root / name).is_file():
                raise BrokenCheckpoint(directory, name, "is missing")
            if (size := (root / name).stat().st_size) != expected:
                raise BrokenCheckpoint(directory, name, f"has {size} bytes, the manifest has {expected}")
        found_now = digests(root, names) if hashes else {}
    except OSError as error:
        where = Path(error.filename or root)
        name = where.relative_to(root).as_posix() if where.is_relative_to(root) else str(where)
        raise BrokenCheckpoint(directory, name, f"cannot be read ({error.strerror})") from error
    for name, found in found_now.items():
        if found["sha256"] != manifest["files"][name]["sha256"]:
            raise BrokenCheckpoint(directory, name, "has the right size but other bytes (sha256 differs)")
    return manifest


def verify_file(path: str | Path) -> None:
    """Compare one file with the manifest beside it, if that is a checkpoint-N's and lists the file.

    For whoever reads a file alone. Raises BrokenCheckpoint, also where the checkpoint has lost its manifest.
    """
    directory, name = Path(path).parent, Path(path).name
    if has_lost_manifest(directory):
        raise BrokenCheckpoint(directory, MANIFEST, "is missing")
    if not (directory / MANIFEST).is_file():
        return
    try:
        read_manifest(directory)
    except BrokenCheckpoint:
        # It may be another program's.
        if any((directory / ours).exists() for ours in ONLY_OF_A_RUN):
            raise
        return
    verify(directory, lambda listed: listed == name)


def has_lost_manifest(directory: Path) -> bool:
    """Tell whether a directory holds a file that only a checkpoint-N of ours has, and no manifest."""
    return not (directory / MANIFEST).is_file() and next(directory.glob("progress_*.pt"), None) is not None


def get_serial(directory: str | Path) -> int:
    """Return how many checkpoints had been saved here before this one, -1 if its manifest cannot be read."""
    try:
        return read_manifest(directory)["serial"]
    except BrokenCheckpoint:
        return -1


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the directories checkpoint-N of a run, the last saved first.

    The order is that of saving: a run that went back to checkpoint-4 and saved checkpoint-8 again is resumed from that
    8, not from a checkpoint-12 of the abandoned run. Those whose manifest cannot be read come first, since each may be
    the last saved one: whoever looks for a complete one reports them before it takes another. One that is no directory
    any more is among them.
    """
    root = Path(output_dir)
    found = [path for path in root.iterdir() if is_final(path)] if root.is_dir() else []
    serials = {path: get_serial(path) for path in found}
    return sorted(found, key=lambda path: (serials[path] < 0, serials[path], get_step(path)), reverse=True)


def is_final(path: str | Path) -> bool:
    """Tell whether a path has the name of a checkpoint that is written, checkpoint-N."""
    return re.fullmatch(r"checkpoint-\d+", Path(path).name) is not None
