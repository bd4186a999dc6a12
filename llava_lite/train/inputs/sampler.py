"""Choose the order in which a run reads its records, from its flags and from what the records say."""

from llava_lite.data.packing import PackSampler, check_pack_lengths
from llava_lite.data.sampler import GroupSampler, ModalityLengthGroupedSampler
from llava_lite.train.compat.order import get_examples


def get_sampler(dataset, args):
    """Return the sampler of groups or packs, or the one by length and modality; None for Trainer's own.

    Raises ValueError, of which DataError is one, where records and flags do not fit.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    num_parts = args.world_size * args.gradient_accumulation_steps
    if getattr(dataset, "groups", None) is not None:
        if args.packing == "tokens":
            raise ValueError(
                "--packing tokens packs records of all groups together, and the types of META share no batch; "
                "drop the flag, or the types."
            )
        return GroupSampler(dataset.lengths, dataset.groups, args.train_batch_size, num_parts, seed)
    if args.packing == "tokens":
        check_pack_lengths(dataset, args.packing_tokens)
        return PackSampler(dataset.lengths, args.packing_tokens, seed)
    if not args.group_by_modality_length:
        return None
    lengths, has_image = get_examples(dataset)
    return ModalityLengthGroupedSampler(lengths, has_image, args.train_batch_size, num_parts, seed)
