"""Turn a directory of written files into a checkpoint that is complete or absent."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING_PREFIX = "tmp-"
REPLACED = "-replaced"
# One thread hashes 0.5 to 2 GB/s and releases the GIL; few disks are faster than four of them.
_HASHING_THREADS = 4
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not what was written; `file` is the first wrong one, `reason` what is wrong with it."""

    def __init__(self, directory: str | Path, file: str, reason: str):
        self.directory, self.file, self.reason = Path(directory), file, reason
        super().__init__(f"{directory} is not complete: {file} {reason}.")


class SaveError(RuntimeError):
    """Something could not be written; earlier files are untouched."""


def check_room(directory: str | Path, needed_bytes: int) -> None:
    """Raise OSError with both numbers if the disk of `directory` has less free than is needed."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed, {free_bytes:,} are free", str(directory))


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


def fsync(path: str | Path) -> None:
    """Return once the file's bytes, or the directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(directory: str | Path, names: Iterable[str]) -> None:
    """Flush the named files, then every directory that holds one of them."""
    root = Path(directory)
    paths = [root / name for name in names]
    for path in [*paths, *sorted({path.parent for path in paths} | {root})]:
        fsync(path)


def as_readable_as(directory: str | Path, names: Iterable[str], model: str | Path) -> None:
    """Give the named files the permissions of `model`; safetensors writes its files for their owner alone."""
    for name in names:
        os.chmod(Path(directory) / name, os.stat(model).st_mode & 0o777)


def digests(directory: str | Path, names: Sequence[str]) -> dict[str, dict]:
    """Return {name: {"size": bytes, "sha256": hex}} of the named files, several hashed at a time."""
    root = Path(directory)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: get_sha256(root / name), names))
    sizes = [(root / name).stat().st_size for name in names]
    return {n: {"size": size, "sha256": sha256} for n, size, sha256 in zip(names, sizes, hashes, strict=True)}


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file completely or not at all, flushed to the disk."""
    staged = Path(f"{path}.{STAGING_PREFIX}{os.getpid()}")
    with open(staged, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    fsync(staged.parent)


def read_manifest(directory: str | Path) -> dict:
    """Return the manifest of a checkpoint; raises BrokenCheckpoint where there is none or it does not parse."""
    path = Path(directory) / MANIFEST
    if not Path(directory).is_dir():
        raise BrokenCheckpoint(directory, "the directory", "does not exist")
    if not path.is_file():
        raise BrokenCheckpoint(directory, MANIFEST, "is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict):
            raise TypeError("'files' is no table")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(directory, MANIFEST, f"cannot be read ({error})") from error


def verify(directory: str | Path) -> dict:
    """Compare a checkpoint with its manifest, all sizes before any content, and return the manifest.

    Raises BrokenCheckpoint with the first file that is missing or differs.
    """
    manifest, root = read_manifest(directory), Path(directory)
    for name, expected in sorted(manifest["files"].items()):
        if not (root / name).is_file():
            raise BrokenCheckpoint(directory, name, "is missing")
        size = (root / name).stat().st_size
        if size != expected["size"]:
            raise BrokenCheckpoint(directory, name, f"has {size} bytes, the manifest has {expected['size']}")
    try:
        found_now = digests(root, sorted(manifest["files"]))
    except OSError as error:
        raise BrokenCheckpoint(directory, str(error.filename), f"cannot be read ({error.strerror})") from error
    for name, found in found_now.items():
        if found["sha256"] != manifest["files"][name]["sha256"]:
            raise BrokenCheckpoint(directory, name, "has the right size but other bytes (sha256 differs)")
    return manifest


def get_step(directory: str | Path) -> int | None:
    """Return N of a directory named checkpoint-N, None for any other name."""
    match = _CHECKPOINT.fullmatch(Path(directory).name)
    return int(match.group(1)) if match else None


def get_serial(directory: str | Path) -> int:
    """Return how many checkpoints had been saved here before this one, -1 if its manifest cannot be read."""
    try:
        return int(read_manifest(directory)["serial"])
    except (BrokenCheckpoint, KeyError, TypeError, ValueError):
        return -1


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the directories checkpoint-N of a run, the last saved first.

    The order is that of saving: a run that went back to checkpoint-4 and saved checkpoint-8 again is resumed from that
    8, not from a checkpoint-12 of the abandoned run.
    """
    root = Path(output_dir)
    found = [path for path in root.iterdir() if path.is_dir() and get_step(path) is not None] if root.is_dir() else []
    return sorted(found, key=lambda path: (get_serial(path), get_step(path)), reverse=True)


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last saved checkpoint of `output_dir` that is complete; warn of each broken one with the wrong file.

    None where there is no checkpoint at all. Raises ValueError if there are some and none is complete.
    """
    problems = []
    for directory in checkpoints_in(output_dir):
        try:
            verify(directory)
            return str(directory)
        except BrokenCheckpoint as error:
            logger.warning("%s It is skipped.", error)
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{output_dir} holds {len(problems)} checkpoint(s) and none is complete: {' '.join(problems)} "
            "Move them away, or choose another --output_dir, to start from the beginning."
        )
    return None


def finish_saves(output_dir: str | Path) -> None:
    """Finish saves that were cut off: publish a directory that is complete already, delete the rest."""
    for path in sorted(Path(output_dir).glob(f"{STAGING_PREFIX}checkpoint-*")):
        final = path.with_name(path.name.removeprefix(STAGING_PREFIX).removesuffix(REPLACED))
        # The new directory sorts before the one it replaces, so the new one gets the name.
        if get_step(final) is not None and not final.exists() and is_complete(path):
            logger.info("Publishing %s: its save was cut off after the last byte was written.", final)
            publish(path, final)
        else:
            logger.info("Deleting %s, left by a save that was cut off.", path)
            shutil.rmtree(path, ignore_errors=True)


def is_complete(directory: str | Path) -> bool:
    """Tell whether a directory equals its manifest."""
    try:
        verify(directory)
        return True
    except BrokenCheckpoint:
        return False


def publish(staged: str | Path, final: str | Path) -> None:
    """Give a written and flushed directory its final name; one that has the name already is replaced."""
    staged, final = Path(staged), Path(final)
    replaced = final.with_name(f"{STAGING_PREFIX}{final.name}{REPLACED}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(staged, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(output_dir: str | Path, limit: int | None, keep: Iterable[str | Path] = ()) -> None:
    """Delete the oldest complete checkpoints until `limit` are left; those in `keep` and the last saved one stay.

    Directories without a manifest were not written here and are neither counted nor touched.
    """
    if not limit or limit < 1:
        return
    ours = [path for path in checkpoints_in(output_dir) if (path / MANIFEST).is_file()]
    kept = {Path(path).resolve() for path in keep} | {path.resolve() for path in ours[:1]}
    surplus = len(ours) - limit
    for path in reversed(ours):
        if surplus > 0 and path.resolve() not in kept:
            # Renamed first: a deletion that is cut off must not leave a checkpoint-N with half of its files.
            doomed = path.with_name(f"{STAGING_PREFIX}{path.name}-pruned")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            surplus -= 1
