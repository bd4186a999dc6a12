"""Find the checkpoint that a run goes on from, and refuse one that it could not go on from exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_lite.train import manifest as paper
from llava_lite.train.other_ranks import DIVISION, has_other_ranks, refuse_other_batch
from llava_lite.train.ranks import everyone, raise_together

logger = logging.getLogger(__name__)

# Keys of the model's config that decide how a record becomes an example; checkpoints from before they were kept go on.
AS_EXAMPLES = (
    "vocab_size",
    "conv_template",
    "chat_end_mark",
    "special_tokens_in_text",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_patch_merge_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
)


class WholeCheckpoint(str):
    """The path of a checkpoint that this process has compared with its manifest."""


def find_checkpoint(output_dir: str | Path, wanted: str | bool | None, is_writer: bool = True) -> str | None:
    """Return the checkpoint to go on from, the same on every rank, or None to start from the beginning.

    wanted (--resume_from_checkpoint): a path must be whole; True takes the newest whole checkpoint of `output_dir` and
    there must be one; None does so too, but starts anew where there is no checkpoint-N at all (as LLaVA does); False
    starts anew. All ranks must call this; those with `is_writer` (one, or one a node) look.
    """
    if isinstance(wanted, WholeCheckpoint):
        return wanted
    wanted = {"true": True, "false": False}.get(str(wanted).lower(), wanted)
    if wanted is False:
        return None
    found, error = None, None
    try:
        found = _look_for_checkpoint(output_dir, wanted) if is_writer else None
    except ValueError as problem:
        error = problem
    raise_together(error, ValueError, "Nothing was changed.")
    answers = {path for path, looked in everyone((found, is_writer)) if looked}
    if len(answers) > 1:
        raise ValueError(f"the nodes hold different checkpoints: {sorted(map(str, answers))}. Name one that all have.")
    path = answers.pop()
    return path if path is None else WholeCheckpoint(path)


def _look_for_checkpoint(output_dir: str | Path, wanted: str | bool | None) -> str | None:
    """Return the verified path on this node."""
    if isinstance(wanted, (str, Path)):
        inside = [path.name for path in paper.checkpoints_in(wanted)]
        if inside and not (Path(wanted) / paper.MANIFEST).is_file():
            raise ValueError(f"{wanted} is no checkpoint but holds some: name one of {inside}.")
        paper.verify(wanted)
        return str(wanted)
    paper.settle(output_dir)
    found = paper.newest_whole_checkpoint(output_dir)
    if found is None and wanted is True:
        raise ValueError(f"--resume_from_checkpoint True, but {output_dir} holds no checkpoint-N. Give its path.")
    return found


def refuse_incomplete(path: str, needed: Iterable[str]) -> None:
    """Raise ValueError if a file without which a run does not go on as it was is not part of the checkpoint."""
    files = paper.read_manifest(path)["files"]
    missing = [name for name in needed if name not in files]
    if missing:
        raise ValueError(
            f"{path} cannot be resumed: it holds no {', '.join(missing)} (saved with --save_only_model, or on "
            "other nodes?). Name another checkpoint, or choose a new --output_dir."
        )


def refuse_other_run(path: str, steps: Mapping, schedule: Mapping) -> None:
    """Raise ValueError if the checkpoint is of a run whose steps are other steps; warn if only the schedule differs.

    steps, schedule: what this run is set to, as it will be written in its own manifests.
    """
    manifest = paper.read_manifest(path)
    saved = manifest["steps"]
    steps = {key: value for key, value in steps.items() if key not in AS_EXAMPLES or key in saved}
    if has_other_ranks(saved, steps):
        refuse_other_batch(path, saved, steps)
        saved = saved | {key: steps[key] for key in DIVISION}
    if different := differences(saved, steps):
        raise ValueError(
            f"{path} cannot be resumed exactly: {'; '.join(different)}. Start this run as that one was started "
            "(ranks, batch, accumulation, DeepSpeed stage, data, --tuning), or choose a new --output_dir."
        )
    decays = [bool(settings.get("weight_decay")) for settings in (manifest["schedule"], schedule)]
    if decays[0] != decays[1]:
        raise ValueError(
            f"{path} cannot be resumed: --weight_decay was {manifest['schedule'].get('weight_decay')}, is "
            f"{schedule.get('weight_decay')}, and the optimizer was saved {'with' if decays[0] else 'without'} groups "
            "of weights that decay. Take the old value, or choose a new --output_dir."
        )
    if different := differences(manifest["schedule"], schedule):
        logger.warning("%s goes on otherwise than it began: %s.", path, "; ".join(different))


def differences(saved: Mapping, now: Mapping) -> list[str]:
    """Say which settings differ; of long lists, what is in one only."""
    return [difference(key, saved.get(key), now[key]) for key in now if saved.get(key) != now[key]]


def difference(key: str, saved, now) -> str:
    """Say how one setting of the run differs; of long lists, what is in one only."""
    if isinstance(saved, list) and isinstance(now, list):
        gone, added = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
        return f"{key}: no longer {gone[:3]} ({len(gone)} in all), now also {added[:3]} ({len(added)} in all)"
    return f"{key} was {saved}, is {now}"
