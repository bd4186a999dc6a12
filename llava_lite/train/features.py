"""Let a run read what its frozen tower makes of pictures from disk; what is not there is made before the first step.

Every rank makes a share and all read all of it. They see the same folder, or each node has its own, which the ranks of
that node then fill. No batch of the run reaches the tower: under ZeRO-3 ranks with and without features would hang.
"""

import hashlib
import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_lite.data.cache import cache_root, key_of
from llava_lite.data.feature_cache import KEY, VERSION, FeatureStore, FeatureWriter
from llava_lite.data.scan import DataError
from llava_lite.model.weights import gathered
from llava_lite.resize import pass_order
from llava_lite.train.ranks import everyone, raise_together

logger = logging.getLogger(__name__)

# Pictures of one call of the tower.
BATCH_PICTURES = 16
# The share of the free disk that `auto` takes at most.
AUTO_SHARE = 0.5
DROPOUTS = ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


def use_features(trainer, dataset, where: str) -> None:
    """Let `dataset` bring features in place of pictures, if `where` (a folder, or auto) says so; all ranks must call.

    Raises ValueError where a folder is named and features cannot be kept, or do not fit on its disk.
    """
    tower = trainer.unwrapped.get_vision_tower()
    reason = unfit(tower, dataset)
    root = cache_root() / "features" if where == "auto" else Path(where).expanduser()
    reads_once = reason is None and where == "auto" and not _is_read_again(trainer, dataset)
    # Asked of all: a node that has the folder and those that have none go the same way.
    if reads_once and not any(everyone(root.exists())):
        reason = "one epoch reads them once"
    if reason is None:
        with whole(tower, trainer):
            with together():
                store, num_bytes = open_store(root, tower, dataset, trainer)
            leave_out = None if dataset.left_out is None else trainer.leave_out
            keys, starts = picture_keys(dataset, trainer.args, leave_out)
            reason = _no_use(store, keys, num_bytes, dataset, trainer, where)
            if reason is None:
                fill(store, keys, starts, tower, dataset, trainer.args, leave_out)
                with together():
                    dataset.features = store.view(keys, starts)
                logger.info("pictures are read as features of the frozen tower from %s.", store.folder)
    if reason is not None and where != "auto":
        raise ValueError(f"--feature_cache {where}: {reason}.")
    if reason is not None:
        logger.info("no features are kept on disk: %s.", reason)


def refuse_unusable(where: str) -> None:
    """Raise ValueError if --feature_cache names a word that is no folder's, or a folder that cannot be written."""
    if where in ("off", "auto"):
        return
    if where.lower() in ("off", "auto", "on", "none", "", "true", "false", "yes", "no"):
        raise ValueError(f"--feature_cache {where}: give a folder for the features, auto or off.")
    folder = Path(where).expanduser().absolute()
    # A link that leads nowhere is there, and no folder.
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"--feature_cache {where}: {nearest} is {'not writable' if nearest.is_dir() else 'no folder'}; name a "
            "folder that can be written."
        )


@contextmanager
def together(advice: str = "Mend it, or say --feature_cache off."):
    """Raise ValueError on every rank if anything goes wrong on one of them; no collective may stand inside."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, ValueError, advice)


def unfit(tower, dataset) -> str | None:
    """Return why the features of a tower cannot be kept, None if they can."""
    if tower is None:
        return "the model has no vision tower"
    if any(param.requires_grad for param in tower.parameters()):
        return "the vision tower trains, so its features change"
    drops = [name for name in DROPOUTS if getattr(tower.config, name, 0)]
    if drops:
        return f"the vision tower draws at random ({', '.join(drops)} in its config)"
    if not hasattr(dataset, "annotations"):
        return "pictures of shards are read as they come"
    return None if dataset.has_picture.any() else "no record has a picture"


def _is_read_again(trainer, dataset) -> bool:
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.packing == "tokens" and args.max_steps > 0:
        return args.max_steps * step * args.packing_tokens > dataset.lengths.sum()
    return args.max_steps * step > len(dataset) if args.max_steps > 0 else args.num_train_epochs > 1


def _no_use(store, keys, num_bytes, dataset, trainer, where) -> str | None:
    """Return why the ranks leave the store alone, the same on all of them, and log its size."""
    is_new = np.zeros(len(keys), bool)
    is_new[np.unique(keys, return_index=True)[1]] = True
    is_new &= keys != b""
    with together():
        missing = is_new & (store.find(keys)["shard"] < 0)
        store.folder.mkdir(parents=True, exist_ok=True)
        num_free_bytes = shutil.disk_usage(store.folder).free
    num_new_bytes = int((num_bytes * missing).sum())
    logger.info(
        "features of %d pictures are %.2f GB; %d of them (%.2f GB) are to be made; %s has %.2f GB free.",
        is_new.sum(), (num_bytes * is_new).sum() / 1e9, missing.sum(), num_new_bytes / 1e9, store.folder,
        num_free_bytes / 1e9,
    )  # fmt: skip
    few = where == "auto" and not _is_read_again(trainer, dataset) and missing.sum() > is_new.sum() / 2
    full = num_new_bytes > num_free_bytes * (AUTO_SHARE if where == "auto" else 1)
    votes = everyone((few, full))
    if any(full for _, full in votes):
        advice = "" if where == "auto" else "; name a folder on a disk with more, or say --feature_cache off"
        return f"{num_new_bytes / 1e9:.2f} GB to be made do not fit into {num_free_bytes / 1e9:.2f} GB free{advice}"
    return "one epoch reads them once, and few are there" if any(few for few, _ in votes) else None


@contextmanager
def whole(tower, trainer):
    """Hold the tower ready to run outside an engine, in the run's dtype, all of it on this rank under ZeRO-3."""
    params = list(tower.parameters())
    with gathered(params), torch.no_grad(), trainer.accelerator.autocast():
        if not any(hasattr(param, "ds_id") for param in params):
            tower.to(trainer.args.device)
        yield


def open_store(root: Path, tower, dataset, trainer) -> tuple[FeatureStore, np.ndarray]:
    """Return the store of a tower and of how pictures are prepared, and the bytes [S] that each picture takes."""
    blank = torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device)
    features = tower(blank)
    layout = dataset.layout
    prepared = (repr(dataset.steps), dataset.picture_resize, pass_order())
    if dataset.steps is None:
        prepared = (dataset.image_processor.to_json_string(), type(dataset.image_processor).__name__)
    key = key_of(
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
    )
    num_bytes = np.full(int(dataset.annotations.num_pictures.sum()), features.numel() * features.element_size())
    if layout.is_anyres:
        num_bytes *= np.array([layout.num_crops(size) for size in dataset.annotations.picture_sizes.tolist()])
    return FeatureStore(root / key, features.dtype, features.shape[-1]), num_bytes


def weights_digest(tower) -> str:
    """Return a name for all weights that the tower reads."""
    digest, unread = hashlib.sha256(), tower.unread()
    for name, param in sorted(tower.named_parameters()):
        if param not in unread:
            digest.update(name.encode())
            digest.update(param.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def picture_keys(dataset, args, leave_out=None) -> tuple[np.ndarray, np.ndarray]:
    """Return a key [S] for each picture's file as it is now, and where [N + 1] those of each record begin.

    leave_out: what takes the lines of records that cannot be used, on all ranks together (see SkipMixin.leave_out);
    their keys are empty. Without it they raise an error.
    """
    starts = np.concatenate([[0], np.cumsum(dataset.annotations.num_pictures)])
    share = np.flatnonzero(np.diff(starts))[args.process_index :: args.world_size]
    keys, problems = [], []
    with together("Look at the data with `llava-lite check`."):
        for i in share.tolist():
            found, problem = _keys_of(dataset, i, leave_out is not None)
            keys += found or [b""] * int(starts[i + 1] - starts[i])
            problems += problem
    joined = np.zeros(starts[-1], KEY)
    for numbers, found in everyone((share, np.array(keys, KEY))):
        slots = [slot for i in numbers.tolist() for slot in range(starts[i], starts[i + 1])]
        joined[slots] = found
    if leave_out is not None:
        leave_out(problems)
    return joined, starts


def _keys_of(dataset, i: int, may_leave_out: bool) -> tuple[list[bytes], list[dict]]:
    """Return the keys of a record's pictures, none where it is left out, and what is to be said of it."""
    if may_leave_out and dataset.left_out.has(dataset.annotations.number(i)):
        return [], []
    try:
        record = dataset.annotations[i]
        return [dataset.picture_key(record, image).encode() for image in record.images], []
    except (ValueError, OSError) as error:
        if not may_leave_out:
            raise
        return [], [dataset.problem(i, error)]


def fill(store: FeatureStore, keys: np.ndarray, starts: np.ndarray, tower, dataset, args, leave_out=None) -> None:
    """Make what is missing: each rank a share of it, then, if nodes have folders of their own, each rank of a node.

    leave_out: as in picture_keys; the key of a picture that cannot be used is made empty.
    """
    # Nodes may have unequally many ranks; a launcher that does not say how many has equally many.
    most_local = max(everyone(args.local_process_index)) + 1
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", most_local))
    advice = f"What was made until then is kept in {store.folder}: mend it and start again, or --feature_cache off."
    for place, num_places in ((args.process_index, args.world_size), (args.local_process_index, num_local)):
        # A barrier: what the other ranks have written is seen from here on.
        everyone(None)
        with together(advice):
            missing = np.flatnonzero((store.find(keys)["shard"] < 0) & (keys != b""))
            slots = np.sort(missing[np.unique(keys[missing], return_index=True)[1]])
        if not any(everyone(len(slots))):
            return
        broken = {}
        with together(advice):
            store.sweep()
            pictures = PictureSet(dataset, starts, slots[place::num_places], leave_out is not None)
            broken = write_features(store, keys, pictures, tower, args)
        if leave_out is not None:
            leave_out(_emptied({slot: why for found in everyone(broken) for slot, why in found.items()}, keys, starts,
                               dataset))  # fmt: skip


def _emptied(broken: dict[int, str], keys: np.ndarray, starts: np.ndarray, dataset) -> list[dict]:
    """Make the keys of broken pictures (slot: reason) empty; return a line of each record that shows one of them."""
    problems = []
    for slot, reason in sorted(broken.items()):
        same = np.flatnonzero(keys == keys[slot]) if keys[slot] else np.zeros(0, int)
        for i in sorted({_record_of(starts, other) for other in same.tolist()}):
            error = DataError(f"{dataset.annotations[i].name}: {reason}")
            problems.append(dataset.problem(i, error) | {"kind": "picture"})
        keys[same] = b""
    return problems


def _record_of(starts: np.ndarray, slot: int) -> int:
    return int(np.searchsorted(starts, slot, side="right")) - 1


class PictureSet(Dataset):
    """Pictures by their numbers `slots`, as the tower takes them: (slot, width and height, pixels).

    One that cannot be used is (slot, None, the reason) if it may be left out, else an error.
    """

    def __init__(self, dataset, starts: np.ndarray, slots: np.ndarray, may_leave_out: bool = False):
        self.may_leave_out = may_leave_out
        self.dataset = dataset
        self.starts = starts
        self.slots = slots

    def __len__(self):
        return len(self.slots)

    def __getitem__(self, j: int):
        slot = int(self.slots[j])
        i = _record_of(self.starts, slot)
        try:
            record = self.dataset.annotations[i]
            picture = self.dataset.open(record, record.images[slot - int(self.starts[i])])
            return slot, picture.size, self.dataset.pixels_of(record, picture)
        except DataError as error:
            if not self.may_leave_out:
                raise
            return slot, None, str(error.__cause__ or error)


def write_features(store: FeatureStore, keys: np.ndarray, pictures: PictureSet, tower, args) -> dict[int, str]:
    """Run the tower over the pictures and write what it makes of them; return the reasons for those it cannot have."""
    from tqdm import tqdm

    loader = DataLoader(
        pictures, BATCH_PICTURES, collate_fn=list, num_workers=min(args.dataloader_num_workers, len(pictures))
    )
    bar = tqdm(total=len(pictures), desc="features of pictures", disable=len(pictures) < 512 or args.process_index > 0)
    broken = {}
    with FeatureWriter(store) as writer, bar:
        for found in loader:
            broken |= {slot: reason for slot, size, reason in found if size is None}
            batch = [one for one in found if one[1] is not None]
            bar.update(len(found))
            if not batch:
                continue
            crops = [pixels if pixels.dim() == 4 else pixels[None] for _, _, pixels in batch]
            features = tower(torch.cat(crops)).cpu().split([len(one) for one in crops])
            for (slot, size, pixels), of_crops in zip(batch, features, strict=True):
                writer.add(keys[slot], of_crops if pixels.dim() == 4 else of_crops[0], size)
    return broken
