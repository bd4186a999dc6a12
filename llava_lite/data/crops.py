"""Draw the random crops of a run: a function of its seed, the epoch and the number of a record."""

import torch

from llava_lite.media.random_crop import random_box


class CropDraws:
    """The crops of a training set, the same in every process.

    The epoch is in shared memory, since workers may live as long as the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin(self, epoch: int) -> None:
        """Set the epoch, before a loader begins to read it."""
        self.epoch.fill_(epoch)

    def box(self, size: tuple[int, int], number: int, k: int, epoch: int | None = None) -> tuple[int, int, int, int]:
        """Return the crop (left, top, right, bottom) of image k, of (width, height), of a record by its number.

        epoch: None for the one that has begun.
        """
        epoch = int(self.epoch) if epoch is None else epoch
        return random_box(size, f"{self.seed} {epoch} {number} {k}")
