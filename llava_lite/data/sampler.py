"""Order examples so that a global batch has one modality or group, and its ranks similar numbers of tokens.

After LLaVA's LengthGroupedSampler, which saved 25% of the time of LLaVA-1.5's stage 2 by its authors' account. What
differs: all random numbers come from one seeded generator, so that all ranks agree; lengths may be zero; examples that
do not fill a batch keep the modalities apart as far as possible.
"""

import heapq
from collections import Counter

import torch
from torch.utils.data import Sampler

from llava_lite.data.errors import DataError


def split_to_even_chunks(indices: list[int], lengths, num_chunks: int) -> list[list[int]]:
    """Return the indices as `num_chunks` lists of near-equal length, of equal counts if their number is divisible.

    Each index goes to the chunk with the smallest total length that has room; otherwise they are dealt round-robin.
    """
    if len(indices) % num_chunks:
        return [indices[start::num_chunks] for start in range(num_chunks)]
    chunk_size = len(indices) // num_chunks
    chunks = [[] for _ in range(num_chunks)]
    open_chunks = [(0, k) for k in range(num_chunks)]
    for i in indices:
        total, k = heapq.heappop(open_chunks)
        chunks[k].append(i)
        if len(chunks[k]) < chunk_size:
            heapq.heappush(open_chunks, (total + int(lengths[i]), k))
    return chunks


def _dealt(indices: list[int], lengths, num_chunks: int) -> list[int]:
    """Return the indices of a full global batch in `num_chunks` chunks of equal counts, the longest first."""
    ordered = sorted(indices, key=lambda i: (-lengths[i], i))
    return [i for chunk in split_to_even_chunks(ordered, lengths, num_chunks) for i in chunk]


def modality_length_groups(
    lengths, has_image, batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Return a permutation of range(N) in global batches of batch_size * world_size, each of one modality.

    lengths, has_image: [N]. batch_size: of one device and one forward; world_size: devices times accumulation, so that
    a global batch is an optimizer step. Within it, consecutive batch_size examples go to one device. Examples that do
    not fill a global batch of their modality come last, images before text; one batch of them may be mixed.
    """
    lengths, has_image = list(lengths), [bool(has) for has in has_image]
    if len(lengths) != len(has_image):
        raise ValueError(f"{len(lengths)} lengths but {len(has_image)} entries of has_image.")
    global_size = batch_size * world_size
    batches, rest = [], []
    for kind in (True, False):
        members = [i for i, has in enumerate(has_image) if has is kind]
        order = torch.randperm(len(members), generator=generator).tolist()
        members = [members[k] for k in order]
        num_full = len(members) - len(members) % global_size
        batches += [members[start : start + global_size] for start in range(0, num_full, global_size)]
        rest += members[num_full:]
    order = torch.randperm(len(batches), generator=generator).tolist()
    grouped = [i for k in order for i in _dealt(batches[k], lengths, world_size)]
    full_rest = len(rest) - len(rest) % global_size
    for start in range(0, full_rest, global_size):
        grouped += _dealt(rest[start : start + global_size], lengths, world_size)
    return grouped + rest[full_rest:]


def group_length_batches(lengths, groups, batch_size: int, world_size: int, generator: torch.Generator) -> list[int]:
    """Return the indices of an epoch in global batches of one group each, in an order of the batches drawn again.

    groups: names [N]; the other arguments as in modality_length_groups. The last batch of a group is filled with
    records of its own from the beginning of its order, so that none is left out. LLaMA2-Accessory drops what does not
    fill a batch, sorts a group by length and keeps its order.
    """
    global_size, batches = batch_size * world_size, []
    for group in sorted(set(groups)):
        members = [i for i, own in enumerate(groups) if own == group]
        order = torch.randperm(len(members), generator=generator).tolist()
        members = [members[k] for k in order]
        members += members[: -len(members) % global_size]
        batches += [members[start : start + global_size] for start in range(0, len(members), global_size)]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [i for k in order for i in _dealt(batches[k], lengths, world_size)]


class ModalityLengthGroupedSampler(Sampler):
    """The order of each epoch, a function of seed and epoch only: equal on every rank and after a resume.

    lengths, has_image, batch_size, world_size: as in modality_length_groups.
    """

    def __init__(self, lengths, has_image, batch_size: int, world_size: int, seed: int = 0):
        self.lengths = [int(length) for length in lengths]
        self.has_image = [bool(has) for has in has_image]
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next order."""
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch; resuming at position p is `order(epoch)[p:]`."""
        # Not seed + epoch: runs with adjacent seeds would share their epochs.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return modality_length_groups(self.lengths, self.has_image, self.batch_size, self.world_size, generator)

    def __iter__(self):
        return iter(self.order(self.epoch))


class GroupSampler(ModalityLengthGroupedSampler):
    """The order of each epoch where no two groups share a global batch (the `type` of META), like its parent.

    groups: a name for each example [N]; the other arguments as in modality_length_groups. An epoch has each example
    once, and a few of a group twice that does not fill its last batch. Raises DataError for a group that is smaller
    than a global batch.
    """

    def __init__(self, lengths, groups, batch_size: int, world_size: int, seed: int = 0):
        super().__init__(lengths, [True] * len(lengths), batch_size, world_size, seed)
        if len(self.lengths) != len(groups):
            raise ValueError(f"{len(self.lengths)} lengths but {len(groups)} groups.")
        self.groups = list(groups)
        self.counts = Counter(self.groups)
        global_size = batch_size * world_size
        for group, count in sorted(self.counts.items()):
            if count < global_size:
                records = f"{count:,} record{'s' * (count != 1)}"
                raise DataError(
                    f"the group {group!r} of META has {records}, and a step trains on {global_size:,} of one group. "
                    "Give the group more records, or a smaller batch: --per_device_train_batch_size x devices x "
                    "--gradient_accumulation_steps."
                )

    def __len__(self):
        global_size = self.batch_size * self.world_size
        return sum(-(-count // global_size) * global_size for count in self.counts.values())

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch; resuming at position p is `order(epoch)[p:]`."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return group_length_batches(self.lengths, self.groups, self.batch_size, self.world_size, generator)
