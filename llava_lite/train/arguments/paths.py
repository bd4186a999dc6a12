"""Check the paths of a run before anything is loaded for it; report the first that is missing, with what to do."""

import difflib
import logging
import os
from pathlib import Path

from llava_lite.hub.source import VISION_TOWER, check_directory, check_source, did_you_mean
from llava_lite.train.arguments.legacy import open_yaml, split_flags
from llava_lite.train.arguments.tuning import PARTIAL_TUNINGS

logger = logging.getLogger(__name__)

NEEDED = {
    "model_name_or_path": "a language model, or the output of an earlier stage",
    "data_path": "one or more files of records",
    "output_dir": "the directory for checkpoints and the finished model",
}


def check_needed(argv) -> None:
    """Raise ValueError naming every flag that a run needs and a command line, or its YAML file, does not have."""
    given = {name for name, values in split_flags(open_yaml(argv)) if values}
    missing = [f"--{name} ({words})" for name, words in NEEDED.items() if name not in given]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise ValueError(f"{listed} {verb} needed. `llava-lite train --help` shows the main flags.")


def check_paths(model_args, data_args, training_args) -> None:
    """Raise OSError or ValueError for the first path of a run that leads nowhere, before anything is loaded for it."""
    check_source(model_args.model_name_or_path, "--model_name_or_path", cache_dir=training_args.cache_dir)
    if model_args.vision_tower is not None:
        check_tower(model_args.vision_tower, training_args.cache_dir)
    check_projector(model_args.pretrain_mm_mlp_adapter)
    check_directory(data_args.image_folder, "--image_folder")
    check_output(training_args.output_dir)
    check_not_replaced(training_args.output_dir, model_args.model_name_or_path)
    if training_args.tuning in PARTIAL_TUNINGS and not training_args.save_full:
        warn_if_base_may_be_deleted(model_args.model_name_or_path)
    check_resume(training_args.resume_from_checkpoint, training_args.output_dir)


def check_tower(name: str, cache_dir=None) -> None:
    """Raise an error if the vision tower is not there, or is a model of another kind; only its config is read."""
    from llava_lite.model.encoders import TOWERS
    from llava_lite.tower_config import load_vision_config

    check_source(name, "--vision_tower", VISION_TOWER, cache_dir=cache_dir)
    kind = load_vision_config(name, cache_dir).model_type
    if kind not in TOWERS:
        raise ValueError(
            f"--vision_tower {name!r} is no vision tower (model_type {kind!r}); known: {', '.join(sorted(TOWERS))}, "
            f"such as {VISION_TOWER}."
        )


def check_projector(path: str | None) -> None:
    """Raise OSError if the file of connector weights does not exist, with the file that a directory holds."""
    if path is None or os.path.isfile(path):
        return
    inside = os.path.join(path, "mm_projector.bin")
    if os.path.isfile(inside):
        raise IsADirectoryError(f"--pretrain_mm_mlp_adapter {path!r} is a directory; give the file: {inside!r}.")
    if os.path.isdir(path):
        raise FileNotFoundError(f"--pretrain_mm_mlp_adapter {path!r}: this directory holds no mm_projector.bin.")
    raise FileNotFoundError(
        f"--pretrain_mm_mlp_adapter {path!r}: there is no such file.{did_you_mean(path)} Stage 1 writes "
        "mm_projector.bin into its --output_dir."
    )


def check_output(path: str) -> None:
    """Raise OSError if nothing can be written to the output directory."""
    nearest = Path(path)
    if nearest.exists() and not nearest.is_dir():
        raise NotADirectoryError(f"--output_dir {path!r} is a file; give a directory.")
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {path!r} cannot be written: {str(nearest)!r} does not allow it.")


def check_not_replaced(output_dir: str, model: str) -> None:
    """Raise ValueError if the run would replace the model that it starts from."""
    if os.path.isdir(model) and os.path.realpath(output_dir) == os.path.realpath(model):
        raise ValueError(
            f"--output_dir {output_dir!r} is the directory of --model_name_or_path, which this run would replace: "
            "give another one."
        )


def warn_if_base_may_be_deleted(model: str) -> None:
    """Warn that the trained weights need their base, if that is a checkpoint which its own run may delete."""
    from llava_lite.checkpoints.step_weights import holds_step

    if os.path.isdir(model) and holds_step(model):
        logger.warning(
            "--model_name_or_path %s is a checkpoint of another run, and this one writes trained weights only: keep "
            "the checkpoint (--save_total_limit of that run may delete it), or start from `llava-lite merge %s OUT`.",
            model,
            model,
        )


def check_resume(wanted, output_dir: str) -> None:
    """Raise OSError if --resume_from_checkpoint names a directory that does not exist, with those that do."""
    if not isinstance(wanted, str) or wanted.lower() in ("true", "false") or os.path.isdir(wanted):
        return
    there = sorted(str(path) for path in Path(output_dir).glob("checkpoint-*"))
    near = difflib.get_close_matches(wanted, there, n=1) or there[-1:]
    hint = f" There is {near[0]!r}." if near else f" {output_dir!r} holds no checkpoint."
    raise FileNotFoundError(f"--resume_from_checkpoint {wanted!r}: there is no such directory.{hint}")


def check_enough_records(train_set, eval_set, args) -> None:
    """Raise ValueError if --dataloader_drop_last leaves no micro-batch for every rank, to train or to evaluate on."""
    if not args.dataloader_drop_last:
        return
    for what, dataset, batch in (
        ("train", train_set, args.per_device_train_batch_size),
        ("evaluate", eval_set, args.per_device_eval_batch_size),
    ):
        # For shards the number is not known; for packs see PackSampler.
        if dataset is None or not hasattr(dataset, "__len__") or (what == "train" and args.packing == "tokens"):
            continue
        wanted = batch * args.world_size
        if len(dataset) < wanted:
            flag = f"--per_device_{'train' if what == 'train' else 'eval'}_batch_size"
            raise ValueError(
                f"--dataloader_drop_last True leaves nothing to {what} on: {len(dataset)} records are fewer than the "
                f"{wanted} of one batch ({args.world_size} rank{'s' * (args.world_size > 1)} x {flag} {batch}). Drop "
                "the flag, or use a smaller batch."
            )
