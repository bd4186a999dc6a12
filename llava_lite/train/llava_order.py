"""Order examples under the names of LLaVA's `llava_trainer`, with our own orders behind them."""

from torch.utils.data import Sampler

from llava_lite.data.sampler import modality_length_groups, split_to_even_chunks

__all__ = [
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]


def get_length_grouped_indices(lengths, batch_size, world_size, generator=None, merge=True):
    """Return a permutation of range(N) in global batches of batch_size * world_size, of near-equal length a device.

    generator: None for torch's own. merge: accepted and not read, as in LLaVA.
    """
    return modality_length_groups(lengths, [True] * len(lengths), batch_size, world_size, generator)


def get_modality_length_grouped_indices(lengths, batch_size, world_size, generator=None):
    """Return a permutation of range(N) in global batches that are all pictures or all text.

    lengths: above zero for an example with pictures, below for one of text alone, which a length of zero is too; LLaVA
    refuses that. Every draw comes from `generator`, where LLaVA takes some from torch's own.
    """
    has_picture = [length > 0 for length in lengths]
    return modality_length_groups([abs(length) for length in lengths], has_picture, batch_size, world_size, generator)


class LengthGroupedSampler(Sampler):
    """A new order of near-equal lengths each time it is walked through, with group_by_modality of one kind a batch.

    batch_size: of one device; world_size: devices times accumulation. generator: None for torch's own, which ranks
    must have seeded alike; training takes ModalityLengthGroupedSampler, where seed and epoch say it all.
    """

    def __init__(self, batch_size, world_size, lengths=None, generator=None, group_by_modality=False):
        if lengths is None:
            raise ValueError("the sampler needs lengths: one number an example, below zero for text alone.")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(order(self.lengths, self.batch_size, self.world_size, generator=self.generator))


def examples_of(dataset):
    """Return (lengths, has_picture) of a dataset: its own words for it, or LLaVA's `modality_lengths`."""
    if hasattr(dataset, "has_picture"):
        return dataset.lengths, dataset.has_picture
    lengths = dataset.modality_lengths
    return [abs(length) for length in lengths], [length > 0 for length in lengths]
