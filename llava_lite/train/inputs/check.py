"""Check, before a model is loaded, that the records of a run exist and show the images that its tuning needs."""

import os
from pathlib import Path

from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.index.sources import is_shards
from llava_lite.data.records.record import missing_images
from llava_lite.data.shards.read import find_shards, first_image, first_record


def check_images_exist(data_args):
    """Raise FileNotFoundError for a file of records, or a local shard, that does not exist.

    The first rank of a node looks for shards, of which there may be many; remote ones are found when the run opens
    them.
    """
    for flag in ("data_path", "eval_data_path"):
        paths = getattr(data_args, flag)
        if paths and is_shards(paths):
            local = [path for path in paths if "://" not in path]
            if local and os.environ.get("LOCAL_RANK", "0") == "0":
                find_shards(local)
            continue
        missing = [path for path in paths or () if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"--{flag} {' '.join(missing)}: no such file.")


def check_sees_images(data_args, training_args):
    """Raise ValueError if a run that trains on images only has none, before a model is loaded for it.

    All annotation files are checked (and indexed, which the run needs anyway), of shards the first records; the very
    first record must be readable, unless bad ones are left out.
    """
    paths, found = data_args.data_path, None
    if paths and is_shards(paths):
        # The process group does not exist yet: every node looks by itself.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = look_at_shards(paths, data_args, training_args.tuning)
    elif paths and training_args.tuning == "projector":
        num_workers = training_args.dataloader_num_workers
        annotations = open_annotations(paths, data_args.image_folder, num_workers=num_workers)
        found = None if annotations.has_image.any() else without_image(annotations)
    if found is not None:
        raise ValueError(
            f"{', '.join(paths)}: {found}. --tuning projector trains what turns image features into embeddings, and "
            "nothing else; for text alone use another --tuning. `llava-lite check` looks at each record."
        )


def look_at_shards(paths, data_args, tuning) -> str | None:
    """Return what is wrong if --tuning needs images and none is among the first records, else None."""
    shards = find_shards(paths)
    if data_args.bad_record == "raise":
        record = first_record(shards)
        reason = None if record is None or data_args.placeholder_as_text else missing_images(record)
        if reason is not None:
            raise ValueError(reason)
    num_seen = first_image(shards) if tuning == "projector" else 0
    return f"none of the first {num_seen:,} records has an image" if num_seen else None


def without_image(annotations) -> str:
    """Return the message for records without any image, with the first that may have lost its own."""
    facts, total = annotations.record_facts(), len(annotations)
    lost = (facts.num_images < 0) | (facts.num_missing > 0)
    if not lost.any():
        return f"none of {total:,} records has an image"
    first = int(lost.argmax())
    try:
        reason = missing_images(annotations[first])
    except ValueError as error:
        reason = str(error)
    what = "can be used" if lost.all() else "has an image"
    return f"none of {total:,} records {what}; the first: {str(reason).rstrip('.')}"
