"""Fill the cache of vision features before the first step: find what is missing, run the frozen tower, write."""

import logging
import os
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_lite.data.check.check import get_path
from llava_lite.data.errors import DataError
from llava_lite.data.feature_cache import KEY, FeatureStore, FeatureWriter
from llava_lite.data.reading import dead_workers_named
from llava_lite.distributed.activity import NotedBatches
from llava_lite.distributed.ranks import everyone
from llava_lite.train.together import together

# Images of one call of the tower, if more than one.
BATCH_IMAGES = 16
# Up to so many stored features a rank are compared with their checksums before the first step, and all when read.
CHECKED_BYTES = 8 << 30

logger = logging.getLogger(__name__)


class Broken(NamedTuple):
    """An image that cannot be used. path: of its file, if the reason names one."""

    reason: str
    path: str | None


def image_keys(dataset, args, leave_out) -> tuple[np.ndarray, np.ndarray]:
    """Return a key [S] for the present file of each image, and the offsets [N + 1] at which records begin.

    leave_out: receives the lines of records that cannot be used, on all ranks together (see SkipMixin.leave_out);
    their keys are empty.
    """
    starts = np.concatenate([[0], np.cumsum(dataset.annotations.num_images)])
    own = np.flatnonzero(np.diff(starts))[args.process_index :: args.world_size]
    keys, problems = [], []
    with together(ValueError, "Check the data with `llava-lite check`."):
        for i in own.tolist():
            found, problem = _get_keys(dataset, i)
            keys += found or [b""] * int(starts[i + 1] - starts[i])
            problems += problem
    joined = np.zeros(starts[-1], KEY)
    for numbers, found in everyone((own, np.array(keys, KEY))):
        slots = [slot for i in numbers.tolist() for slot in range(starts[i], starts[i + 1])]
        joined[slots] = found
    leave_out(problems)
    return joined, starts


def _get_keys(dataset, i: int) -> tuple[list[bytes], list[dict]]:
    """Return the keys of a record's images and the lines of its problems; no keys where it is left out."""
    if dataset.left_out.has(dataset.annotations.number(i)):
        return [], []
    try:
        record = dataset.annotations[i]
        return [dataset.image_key(record, image).encode() for image in record.images], []
    except DataError as error:
        return [], [dataset.problem(i, error)]


def fill(store: FeatureStore, keys: np.ndarray, starts: np.ndarray, tower, dataset, args, leave_out) -> None:
    """Compute the missing features, each rank a part; then again by node, if nodes have directories of their own.

    leave_out: as in image_keys; the key of an image that cannot be used is made empty.
    """
    # Nodes may have different numbers of ranks; a launcher that sets no LOCAL_WORLD_SIZE has equally many.
    most_local = max(everyone(args.local_process_index)) + 1
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", most_local))
    advice = f"Features made so far stay in {store.directory}: fix it and start again, or give --feature_cache off."
    with together(ValueError, advice):
        drop_damaged(store, keys, args.local_process_index, num_local)
    for place, num_places in ((args.process_index, args.world_size), (args.local_process_index, num_local)):
        # A barrier: from here on this rank sees what the others have written.
        everyone(None)
        with together(ValueError, advice):
            missing = np.flatnonzero((store.find(keys)["shard"] < 0) & (keys != b""))
            slots = np.sort(missing[np.unique(keys[missing], return_index=True)[1]])
        if not any(everyone(len(slots))):
            return
        with together(ValueError, advice):
            store.sweep()
            images = ImageSet(dataset, starts, slots[place::num_places])
            broken = write_features(store, keys, images, tower, args)
        broken = {slot: problem for found in everyone(broken) for slot, problem in found.items()}
        leave_out(_emptied(broken, keys, starts, dataset))


def drop_damaged(store: FeatureStore, keys: np.ndarray, part: int, num_parts: int) -> None:
    """Take damaged features off the lists, each rank of a node its part, where reading them takes little time."""
    stored = np.unique(keys[keys != b""])
    places = store.find(stored)
    is_mine = np.flatnonzero(places["shard"] >= 0)[part::num_parts]
    if store.num_bytes(places[is_mine]).sum() > CHECKED_BYTES:
        return
    num_damaged = store.drop_damaged(stored[is_mine])
    if num_damaged:
        logger.warning("features of %d image(s) in %s are damaged: they are made again.", num_damaged, store.directory)


def _emptied(broken: dict[int, Broken], keys: np.ndarray, starts: np.ndarray, dataset) -> list[dict]:
    """Make the keys of broken images (by slot) empty; return a line of each record that shows one of them."""
    problems = []
    for slot, (reason, path) in sorted(broken.items()):
        same = np.flatnonzero(keys == keys[slot]) if keys[slot] else np.zeros(0, int)
        for i in sorted({_get_record(starts, other) for other in same.tolist()}):
            error = DataError(f"{dataset.annotations[i].name}: {reason}")
            problems.append(dataset.problem(i, error) | {"kind": "image", "path": path})
        keys[same] = b""
    return problems


def _get_record(starts: np.ndarray, slot: int) -> int:
    return int(np.searchsorted(starts, slot, side="right")) - 1


class ImageSet(Dataset):
    """The images with the numbers `slots`, for the tower: (slot, width and height, pixels).

    An image that cannot be used is (slot, None, Broken).
    """

    def __init__(self, dataset, starts: np.ndarray, slots: np.ndarray):
        self.dataset = dataset
        self.starts = starts
        self.slots = slots

    def __len__(self):
        return len(self.slots)

    def __getitem__(self, j: int):
        slot = int(self.slots[j])
        i = _get_record(self.starts, slot)
        try:
            record = self.dataset.annotations[i]
            image = self.dataset.open(record, record.images[slot - int(self.starts[i])])
            return slot, image.size, self.dataset.get_pixels(record, image)
        except DataError as error:
            return slot, None, Broken(str(error.__cause__ or error), get_path(error.__cause__))
        finally:
            if self.dataset.reading is not None:
                self.dataset.reading.end()


def images_at_once(args) -> int:
    """Return how many images a call of the tower gets.

    One on a CPU if a micro-batch is one record: the features, and the run, are then bit for bit those without a cache
    where no record has several images. Kernels may round a larger batch otherwise, and a GPU is slow with one image.
    """
    is_alone = args.device.type == "cpu" and args.per_device_train_batch_size == 1 and args.packing != "tokens"
    return 1 if is_alone else BATCH_IMAGES


def write_features(store: FeatureStore, keys: np.ndarray, images: ImageSet, tower, args) -> dict[int, Broken]:
    """Run the tower over the images and write their features; return those that cannot be used, by slot."""
    from tqdm import tqdm

    loader = DataLoader(
        images, images_at_once(args), collate_fn=list, num_workers=min(args.dataloader_num_workers, len(images))
    )
    bar = tqdm(total=len(images), desc="features of images", disable=len(images) < 512 or args.process_index > 0)
    broken = {}
    with FeatureWriter(store) as writer, bar, dead_workers_named(images.dataset.reading):
        for found in NotedBatches(loader, "features of images", alone=True, readers=images.dataset.reading):
            broken |= {slot: problem for slot, size, problem in found if size is None}
            batch = [one for one in found if one[1] is not None]
            bar.update(len(found))
            if not batch:
                continue
            crops = [pixels if pixels.dim() == 4 else pixels[None] for _, _, pixels in batch]
            features = tower(torch.cat(crops)).cpu().split([len(one) for one in crops])
            for (slot, size, pixels), of_crops in zip(batch, features, strict=True):
                writer.add(keys[slot], of_crops if pixels.dim() == 4 else of_crops[0], size)
    return broken
