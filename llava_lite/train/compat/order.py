"""The samplers of LLaVA's `llava_trainer` under its names, with our own orders."""

from torch.utils.data import Sampler

from llava_lite.data.sampler import modality_length_groups


def get_length_grouped_indices(lengths, batch_size, world_size, generator=None, merge=True):
    """Return a permutation of range(N) in global batches of batch_size * world_size, of near-equal length a device.

    generator: None for torch's own. merge: accepted and not read, as in LLaVA.
    """
    return modality_length_groups(lengths, [True] * len(lengths), batch_size, world_size, generator)


def get_modality_length_grouped_indices(lengths, batch_size, world_size, generator=None):
    """Return a permutation of range(N) in global batches that are all images or all text.

    lengths: above zero for an example with images, below for one of text alone, which a length of zero is too; LLaVA
    raises there. All random numbers come from `generator`, where LLaVA draws some from torch's own.
    """
    has_image = [length > 0 for length in lengths]
    return modality_length_groups([abs(length) for length in lengths], has_image, batch_size, world_size, generator)


class LengthGroupedSampler(Sampler):
    """A new order with batches of near-equal length at each iteration; with group_by_modality also of one modality.

    batch_size: of one device; world_size: devices times accumulation. generator: None for torch's own, which ranks
    must have seeded alike; `train` has ModalityLengthGroupedSampler, which depends on seed and epoch only.
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


def get_examples(dataset):
    """Return (lengths, has_image) of a dataset, by its own attributes or LLaVA's `modality_lengths`."""
    if hasattr(dataset, "has_image"):
        return dataset.lengths, dataset.has_image
    lengths = dataset.modality_lengths
    return [abs(length) for length in lengths], [length > 0 for length in lengths]
