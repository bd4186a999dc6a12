"""Train from cached vision features: fill the cache before step 1, then read image features from disk.

Each rank fills a part and all ranks read all of it. They see the same directory, or each node has its own, which the
ranks of that node then fill. No batch of the run reaches the tower: under ZeRO-3 ranks with and without features would
hang.
"""

import hashlib
import logging
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from llava_lite.checkpoints.copying import gathered
from llava_lite.data.feature_cache import VERSION, FeatureStore
from llava_lite.data.index.cache import cache_root, get_key
from llava_lite.distributed.ranks import everyone
from llava_lite.media.resize import pass_order
from llava_lite.train.inputs.feature_fill import fill, image_keys
from llava_lite.train.together import together

logger = logging.getLogger(__name__)

# The fraction of the free disk that `auto` fills at most.
AUTO_FRACTION = 0.5
ADVICE = "Fix it, or give --feature_cache off."
DROPOUTS = ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


def use_features(trainer, dataset, where: str) -> None:
    """Let `dataset` return features in place of images, as `where` (a directory, or auto) asks; all ranks must call.

    Raises ValueError if a directory is named and features cannot be cached, or do not fit on its disk. Whether they
    are made now or were made before, the random state is afterwards what it was.
    """
    with kept_random_state():
        _use_features(trainer, dataset, where)


@contextmanager
def kept_random_state():
    """Give the random states of torch on every device, NumPy and Python back their values when the block ends."""
    numbers, python = np.random.get_state(), random.getstate()
    try:
        # A data loader draws the seed of its workers, and images may be opened by anyone's code.
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)


def _use_features(trainer, dataset, where: str) -> None:
    tower = trainer.unwrapped.get_vision_tower()
    reason = why_not_cached(tower, dataset)
    root = cache_root() / "features" if where == "auto" else get_directory(where)
    reads_once = reason is None and where == "auto" and not _is_read_again(trainer, dataset)
    # All ranks decide alike, also where one node has the directory and another has none.
    if reads_once and not any(everyone(root.exists())):
        reason = "one epoch reads them once"
    if reason is None:
        with ready_tower(tower, trainer):
            with together(ValueError, ADVICE):
                store, num_bytes = open_store(root, tower, dataset, trainer)
            keys, starts = image_keys(dataset, trainer.args, trainer.leave_out)
            reason = _no_use(store, keys, num_bytes, dataset, trainer, where)
            if reason is None:
                fill(store, keys, starts, tower, dataset, trainer.args, trainer.leave_out)
                with together(ValueError, ADVICE):
                    dataset.features = store.view(keys, starts)
                logger.info("images are read as cached features of the frozen tower from %s.", store.directory)
    if reason is not None and where != "auto":
        raise ValueError(f"--feature_cache {where}: {reason}.")
    if reason is not None:
        logger.info("no features are cached on disk: %s.", reason)


def get_directory(where: str) -> Path:
    """Return the directory that --feature_cache names; ValueError for a `~name` that is nobody's home."""
    try:
        return Path(where).expanduser()
    except RuntimeError as error:
        raise ValueError(f"--feature_cache {where}: {error} Name a directory that can be written.") from None


def check_feature_cache(where: str) -> None:
    """Raise ValueError if --feature_cache is neither auto nor off nor a directory that can be written."""
    if where in ("off", "auto"):
        return
    if where.lower() in ("off", "auto", "on", "none", "", "true", "false", "yes", "no"):
        raise ValueError(f"--feature_cache {where}: give a directory for the features, auto or off.")
    directory = get_directory(where).absolute()
    # A broken link exists and is no directory.
    nearest = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"--feature_cache {where}: {nearest} is {'not writable' if nearest.is_dir() else 'no directory'}; name a "
            "directory that can be written."
        )


def why_not_cached(tower, dataset) -> str | None:
    """Return why the features of a tower cannot be cached, None if they can."""
    if tower is None:
        return "the model has no vision tower"
    if any(param.requires_grad for param in tower.parameters()):
        return "the vision tower trains, so its features change"
    if dataset.layout.aspect_ratio == "random_crop":
        return "--image_aspect_ratio random_crop shows another part of an image in every epoch"
    drops = [name for name in DROPOUTS if getattr(tower.config, name, 0)]
    if drops:
        return f"the vision tower has dropout ({', '.join(drops)} in its config)"
    if not hasattr(dataset, "annotations"):
        return "shards are read as a stream, without an index of images"
    media = dataset.annotations.count_media()
    if media:
        return f"some records have media ({', '.join(media)}) that are mixed again from their files in every epoch"
    return None if dataset.has_image.any() else "no record has an image"


def _is_read_again(trainer, dataset) -> bool:
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.packing == "tokens" and args.max_steps > 0:
        return args.max_steps * step * args.packing_tokens > dataset.lengths.sum()
    return args.max_steps * step > len(dataset) if args.max_steps > 0 else args.num_train_epochs > 1


def _no_use(store, keys, num_bytes, dataset, trainer, where) -> str | None:
    """Return why the cache is not used, the same on all ranks, or None; log its size."""
    is_new = np.zeros(len(keys), bool)
    is_new[np.unique(keys, return_index=True)[1]] = True
    is_new &= keys != b""
    with together(ValueError, ADVICE):
        missing = is_new & (store.find(keys)["shard"] < 0)
        store.directory.mkdir(parents=True, exist_ok=True)
        num_free_bytes = shutil.disk_usage(store.directory).free
    num_new_bytes = int((num_bytes * missing).sum())
    logger.info(
        "features of %d images are %s bytes; %d of them (%s bytes) are not cached yet; %s bytes are free in %s.",
        is_new.sum(), f"{(num_bytes * is_new).sum():,}", missing.sum(), f"{num_new_bytes:,}", f"{num_free_bytes:,}",
        store.directory,
    )  # fmt: skip
    few = where == "auto" and not _is_read_again(trainer, dataset) and missing.sum() > is_new.sum() / 2
    full = num_new_bytes > num_free_bytes * (AUTO_FRACTION if where == "auto" else 1)
    votes = everyone((few, full))
    if any(full for _, full in votes):
        advice = "" if where == "auto" else "; name a directory on a disk with more, or give --feature_cache off"
        free = f"the {num_free_bytes:,} bytes that are free in {store.directory}"
        return f"{num_new_bytes:,} bytes of features do not fit into {free}{advice}"
    return "one epoch reads them once, and few are cached" if any(few for few, _ in votes) else None


@contextmanager
def ready_tower(tower, trainer):
    """Let the tower run outside an engine: in the run's dtype, on its device, gathered under ZeRO-3."""
    params = list(tower.parameters())
    with gathered(params), torch.no_grad(), trainer.accelerator.autocast():
        if not any(hasattr(param, "ds_id") for param in params):
            tower.to(trainer.args.device)
        yield


def open_store(root: Path, tower, dataset, trainer) -> tuple[FeatureStore, np.ndarray]:
    """Return the store for a tower and an image transform, and the bytes [S] of each image's features."""
    empty_image = torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device)
    features = tower(empty_image)
    layout = dataset.layout
    prepared = (repr(dataset.transform), dataset.image_resize, pass_order())
    if dataset.transform is None:
        prepared = (dataset.image_processor.to_json_string(), type(dataset.image_processor).__name__)
    key = get_key(
        VERSION,
        weights_digest(tower),
        tower.config.to_json_string(),
        tower.config._attn_implementation,
        tower.num_read_layers,
        tower.select_feature,
        features.dtype,
        torch.is_autocast_enabled(tower.device.type) and torch.get_autocast_dtype(tower.device.type),
        tower.device.type,
        layout.aspect_ratio,
        layout.pinpoints,
        *prepared,
        # Not of a plain tower, whose caches stay as they are.
        *(("projection",) if tower.projects else ()),
        *((layout.channels,) if layout.channels != "rgb" else ()),
    )
    num_bytes = np.full(int(dataset.annotations.num_images.sum()), features.numel() * features.element_size())
    if layout.is_anyres:
        num_bytes *= np.array([layout.num_crops(size) for size in dataset.annotations.image_sizes.tolist()])
    return FeatureStore(root / key, features.dtype, features.shape[-1]), num_bytes


def weights_digest(tower) -> str:
    """Return the SHA-256 of all weights of the tower that its features depend on."""
    digest, unread = hashlib.sha256(), tower.unread()
    for name, param in sorted(tower.named_parameters()):
        if param not in unread:
            digest.update(name.encode())
            digest.update(param.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
