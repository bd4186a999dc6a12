"""Turn a directory of written files into a checkpoint that is complete or absent."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from llava_lite.checkpoints.manifest import (
    MANIFEST,
    BrokenCheckpoint,
    checkpoints_in,
    digests,
    get_serial,
    get_step,
    is_final,
    list_files,
    read_manifest,
    seal,
    to_text,
    verify,
)

# The rest of the package takes all that concerns a checkpoint's files from here.
__all__ = ["MANIFEST", "BrokenCheckpoint", "checkpoints_in", "digests", "get_serial", "get_step", "list_files"]
__all__ += ["read_manifest", "verify"]

logger = logging.getLogger(__name__)

STAGING_PREFIX = "tmp-"
REPLACED = "-replaced"
# What a resumed run reads if it is there.
_READ_BY_A_RUN = re.compile(
    r"trained\.safetensors|optimizer\.\w+|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|progress_\d+\.pt"
    r"|trainer_state\.json|run_facts\.json|latest|global_step\d+/.*"
)


class SaveError(RuntimeError):
    """Something could not be written; earlier files are untouched."""


def check_room(directory: str | Path, needed_bytes: int) -> None:
    """Raise OSError with both numbers if the disk of `directory` has less free than is needed."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed, {free_bytes:,} are free", str(directory))


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


def write_manifest(directory: str | Path, content: dict) -> None:
    """Write the manifest of a checkpoint, with its own checksum; the checkpoint is complete then."""
    write_text(Path(directory) / MANIFEST, to_text(seal(content)))


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file completely or not at all, flushed to the disk."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file completely or not at all, flushed to the disk."""
    staged = Path(f"{path}.{STAGING_PREFIX}{os.getpid()}")
    with open(staged, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    fsync(staged.parent)


def verify_to_resume(directory: str | Path) -> None:
    """Compare a checkpoint with its manifest; raise BrokenCheckpoint also for a file that a run would read unlisted.

    Other files that the manifest does not list, such as a note or what a tool has left, are reported.
    """
    listed = verify(directory)["files"]
    more = [name for name in list_files(directory) if name not in listed]
    if read := [name for name in more if _READ_BY_A_RUN.fullmatch(name)]:
        reason = "is not in its manifest, and a resumed run would read it: delete the file if it was added by hand"
        raise BrokenCheckpoint(directory, read[0], reason)
    if more:
        logger.warning(
            "%s holds %d file(s) that its manifest does not list, such as %s: they were added after it was saved, and "
            "a resumed run does not read them.",
            *(directory, len(more), more[0]),
        )


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last saved checkpoint of `output_dir` that is complete; warn of each broken one with the wrong file.

    None where there is no checkpoint at all. Raises ValueError if there are some and none is complete.
    """
    problems = []
    for directory in checkpoints_in(output_dir):
        try:
            verify_to_resume(directory)
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
        if is_final(final) and not final.exists() and is_complete(path):
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


def has_right_sizes(directory: str | Path) -> bool:
    """Tell whether every file of a manifest is there with its size."""
    try:
        verify(directory, hashes=False)
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

    Broken ones are neither counted nor touched, nor are directories without a manifest, which were not written here.
    """
    if not limit or limit < 1:
        return
    ours = [path for path in checkpoints_in(output_dir) if has_right_sizes(path)]
    kept = {Path(path).resolve() for path in keep} | {path.resolve() for path in ours[:1]}
    surplus = len(ours) - limit
    for path in reversed(ours):
        if surplus > 0 and path.resolve() not in kept:
            # Renamed first: a deletion that is cut off must not leave a checkpoint-N with half of its files.
            doomed = path.with_name(f"{STAGING_PREFIX}{path.name}-pruned")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            surplus -= 1
