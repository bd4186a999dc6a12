"""Find the checkpoint to resume from, and raise for one that cannot be resumed exactly."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_lite.checkpoints.copying import readable
from llava_lite.checkpoints.engine_files import engine_directory
from llava_lite.constants import with_todays_keys
from llava_lite.distributed.ranks import everyone
from llava_lite.hub.pickles import check_unpacked_size
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.other_ranks import DIVISION, ZERO_STAGE, check_same_batch, has_other_ranks
from llava_lite.train.together import together

logger = logging.getLogger(__name__)

# Endings of the files that torch.save writes here.
PICKLED = (".pt", ".pth", ".bin")
# Config keys that decide how a record becomes an example; checkpoints from before they were kept can be resumed.
AS_EXAMPLES = (
    "vocab_size",
    "conv_template",
    "chat_end_token",
    "special_tokens_in_text",
    "mm_injection",
    "mm_text_only",
    "mm_image_position",
    "image_channels",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_patch_merge_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
)
# Compared where a checkpoint has them: those of earlier versions do not. Without the first two it had none.
WITHOUT_MEANS_NONE = ("--ep_size", "--packing_tokens")
RECORDS = "checksum of the records' texts"
# The types of META: records of two share no batch.
GROUPS = "checksum of the records' groups"
# An image may have been repaired, so other sizes are reported and not refused.
IMAGES = "checksum of the sizes of the images' files"


class CompleteCheckpoint(str):
    """The path of a checkpoint that this process has compared with its manifest."""


def find_checkpoint(output_dir: str | Path, wanted: str | bool | None, is_writer: bool = True) -> str | None:
    """Return the checkpoint to resume from, the same on every rank, or None to start from the beginning.

    wanted (--resume_from_checkpoint): the path of a complete checkpoint; True for the newest complete one in
    `output_dir`, which must exist; None for that one or, where there is no checkpoint-N at all, a new start (as in
    LLaVA); False for a new start. All ranks must call this; those with `is_writer` (one, or one a
    node) read the directory.
    """
    if isinstance(wanted, CompleteCheckpoint):
        return wanted
    wanted = {"true": True, "false": False}.get(str(wanted).lower(), wanted)
    if wanted is False:
        return None
    with together(ValueError, "Nothing was changed.", (OSError, ValueError)):
        found = _look_for_checkpoint(output_dir, wanted) if is_writer else None
    answers = {path for path, looked in everyone((found, is_writer)) if looked}
    if len(answers) > 1:
        raise ValueError(f"the nodes hold different checkpoints: {sorted(map(str, answers))}. Name one that all have.")
    path = answers.pop()
    return path if path is None else CompleteCheckpoint(path)


def _look_for_checkpoint(output_dir: str | Path, wanted: str | bool | None) -> str | None:
    """Return the verified path on this node."""
    if isinstance(wanted, (str, Path)):
        inside = [path.name for path in paper.checkpoints_in(wanted)]
        if inside and not (Path(wanted) / paper.MANIFEST).is_file():
            raise ValueError(f"{wanted} is no checkpoint but holds some: name one of {inside}.")
        paper.verify_to_resume(wanted)
        check_bounds(wanted)
        return str(wanted)
    paper.finish_saves(output_dir)
    found = paper.newest_complete_checkpoint(output_dir)
    if found is None and wanted is True:
        raise ValueError(f"--resume_from_checkpoint True, but {output_dir} holds no checkpoint-N. Give its path.")
    if found is not None:
        check_bounds(found)
    return found


def check_bounds(path: str | Path) -> None:
    """Raise ValueError for a file of a checkpoint that would take far more memory than it has bytes.

    And OSError if it names an engine's directory outside. Trainer and DeepSpeed read what they find, and a manifest
    may be anybody's.
    """
    engine_directory(path)
    for name in paper.list_files(path):
        if name.endswith(PICKLED):
            with readable(Path(path) / name, "the state of a run"):
                check_unpacked_size(Path(path) / name)


def check_complete(path: str, needed: Iterable[str]) -> None:
    """Raise ValueError if the checkpoint lacks a file without which a run cannot be resumed as it was."""
    files = paper.read_manifest(path)["files"]
    missing = [name for name in needed if name not in files]
    if missing:
        raise ValueError(
            f"{path} cannot be resumed: it holds no {', '.join(missing)} (saved with --save_only_model, or on "
            "other nodes?). Name another checkpoint, or choose a new --output_dir."
        )


def check_same_run(path: str, steps: Mapping, schedule: Mapping) -> None:
    """Raise ValueError if the checkpoint is of a run with other steps; warn if only the schedule differs.

    steps, schedule: the settings of this run, as in its own manifests.
    """
    manifest = paper.read_manifest(path)
    saved = with_todays_keys(manifest["steps"])
    steps = {key: value for key, value in steps.items() if key in saved or not is_later(key)}
    if has_other_ranks(saved, steps):
        check_same_batch(path, saved, steps)
        saved = saved | {key: steps[key] for key in DIVISION}
    stages = [settings.get(ZERO_STAGE) for settings in (saved, steps)]
    if None not in stages and stages[0] != stages[1]:
        logger.info("%s was saved under ZeRO-%s and is resumed under ZeRO-%s.", path, *stages)
        saved = saved | {ZERO_STAGE: stages[1]}
    if IMAGES in steps and saved[IMAGES] != steps.pop(IMAGES):
        logger.warning(
            "%s was saved by a run whose image files had other sizes in bytes: this run goes on with the images as "
            "they are now. If none was repaired or replaced on purpose, look at --image_folder.",
            path,
        )
    if different := differences(saved, steps):
        raise ValueError(
            f"{path} cannot be resumed exactly: {'; '.join(different)}. Start this run as that one was started "
            "(ranks, batch, accumulation, DeepSpeed stage, data, flags), or choose a new --output_dir."
        )
    decays = [bool(settings.get("weight_decay")) for settings in (manifest["schedule"], schedule)]
    if decays[0] != decays[1]:
        raise ValueError(
            f"{path} cannot be resumed: --weight_decay was {manifest['schedule'].get('weight_decay')}, is "
            f"{schedule.get('weight_decay')}, and the optimizer was saved {'with' if decays[0] else 'without'} groups "
            "of weights that decay. Give the old value, or choose a new --output_dir."
        )
    known = {key: value for key, value in schedule.items() if key in manifest["schedule"]}
    if different := differences(manifest["schedule"], known):
        logger.warning("%s is resumed with another schedule: %s.", path, "; ".join(different))


def is_later(key: str) -> bool:
    """Tell whether checkpoints of earlier versions do not have a setting of a step."""
    return key in (*AS_EXAMPLES, RECORDS, GROUPS, IMAGES) or (key.startswith("--") and key not in WITHOUT_MEANS_NONE)


def differences(saved: Mapping, now: Mapping) -> list[str]:
    """Return which settings differ, one phrase each."""
    return [difference(key, saved.get(key), now[key]) for key in now if saved.get(key) != now[key]]


def difference(key: str, saved, now) -> str:
    """Return how one setting of the run differs; of lists, what is in one only."""
    if isinstance(saved, list) and isinstance(now, list):
        # As text: a grid of any-resolution is a list of lists.
        was, is_now = {str(value): value for value in saved}, {str(value): value for value in now}
        gone, added = (
            [one[key] for key in sorted(one.keys() - other)] for one, other in ((was, is_now), (is_now, was))
        )
        return f"{key}: no longer {gone[:3]} ({len(gone)} in all), now also {added[:3]} ({len(added)} in all)"
    return f"{key} was {saved}, is {now}"
