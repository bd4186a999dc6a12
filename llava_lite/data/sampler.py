"""Order examples so that a global batch is of one kind, pictures or text, and its ranks get about equally much.

After LLaVA's LengthGroupedSampler: 25% less time for stage 2 of LLaVA-1.5 by its own account. Done otherwise: every
draw comes from one seeded generator, so that all ranks agree; lengths of zero are as good as any; leftovers keep the
kinds apart as far as they can.
"""

import heapq

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: list[int], lengths, num_chunks: int) -> list[list[int]]:
    """Return the indices as `num_chunks` lists of near-equal length, of equal counts if the number can be divided.

    Each in turn goes to the chunk that has least so far and has room; what cannot be divided is dealt like cards.
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
    """Return the indices of a full global batch as `num_chunks` equal counts, one after another, the longest first."""
    ordered = sorted(indices, key=lambda i: (-lengths[i], i))
    return [i for chunk in split_to_even_chunks(ordered, lengths, num_chunks) for i in chunk]


def modality_length_groups(
    lengths, has_picture, batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Return a permutation of range(N) in global batches of batch_size * world_size, each of one modality.

    lengths, has_picture: [N]. batch_size: of one device and one forward; world_size: devices times accumulation, so
    that a global batch is an optimizer step. Within it, consecutive batch_size examples go to one device.
    What does not fill a global batch of its kind comes last, pictures before text; one batch there may be mixed.
    """
    lengths, has_picture = list(lengths), [bool(has) for has in has_picture]
    if len(lengths) != len(has_picture):
        raise ValueError(f"{len(lengths)} lengths but {len(has_picture)} entries of has_picture.")
    global_size = batch_size * world_size
    batches, rest = [], []
    for kind in (True, False):
        members = [i for i, has in enumerate(has_picture) if has is kind]
        order = torch.randperm(len(members), generator=generator).tolist()
        members = [members[k] for k in order]
        num_whole = len(members) - len(members) % global_size
        batches += [members[start : start + global_size] for start in range(0, num_whole, global_size)]
        rest += members[num_whole:]
    order = torch.randperm(len(batches), generator=generator).tolist()
    grouped = [i for k in order for i in _dealt(batches[k], lengths, world_size)]
    whole_rest = len(rest) - len(rest) % global_size
    for start in range(0, whole_rest, global_size):
        grouped += _dealt(rest[start : start + global_size], lengths, world_size)
    return grouped + rest[whole_rest:]


class ModalityLengthGroupedSampler(Sampler):
    """The order of each epoch, a pure function of seed and epoch: equal on every rank and after a resume.

    lengths, has_picture, batch_size, world_size: as in modality_length_groups.
    """

    def __init__(self, lengths, has_picture, batch_size: int, world_size: int, seed: int = 0):
        self.lengths = [int(length) for length in lengths]
        self.has_picture = [bool(has) for has in has_picture]
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch; resuming at position p is `order(epoch)[p:]`."""
        # Not seed + epoch: runs with neighbouring seeds would see each other's epochs.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return modality_length_groups(self.lengths, self.has_picture, self.batch_size, self.world_size, generator)

    def __iter__(self):
        return iter(self.order(self.epoch))
