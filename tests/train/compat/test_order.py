"""LLaVA's names for the order of examples."""

import random
from types import SimpleNamespace

import pytest
import torch

from llava_lite.data.sampler import ModalityLengthGroupedSampler, split_to_even_chunks
from llava_lite.train.compat.order import (
    LengthGroupedSampler,
    get_examples,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dealt_by_hand(indices, lengths, num_chunks):
    """The rule: to the chunk that is shortest, of several the first; a full one takes no more."""
    chunks = [[] for _ in range(num_chunks)]
    for i in indices:
        open_ones = [c for c in chunks if len(c) < len(indices) // num_chunks]
        shortest = min(sum(lengths[j] for j in c) for c in open_ones)
        next(c for c in open_ones if sum(lengths[j] for j in c) == shortest).append(i)
    return chunks


def test_chunks_are_those_of_the_rule():
    rng = random.Random(0)
    for _ in range(50):
        num_chunks, size = rng.randint(1, 5), rng.randint(1, 6)
        lengths = [rng.randint(1, 9) for _ in range(num_chunks * size)]
        indices = rng.sample(range(len(lengths)), len(lengths))
        assert split_to_even_chunks(indices, lengths, num_chunks) == dealt_by_hand(indices, lengths, num_chunks)


def test_what_cannot_be_divided_is_dealt_like_cards():
    assert split_to_even_chunks([5, 6, 7, 8, 9], [1] * 10, 2) == [[5, 7, 9], [6, 8]]


def test_batches_are_of_one_kind_and_every_example_comes_once():
    lengths = [3, -4, 5, -1, 9, -2, 7, -8, 4, -6, 2, -3]
    order = get_modality_length_grouped_indices(lengths, batch_size=2, world_size=3, generator=seeded())
    assert sorted(order) == list(range(12))
    for batch in (order[:6], order[6:]):
        assert len({lengths[i] > 0 for i in batch}) == 1
    again = get_modality_length_grouped_indices(lengths, 2, 3, generator=seeded())
    assert order == again
    torch.manual_seed(5)
    assert get_modality_length_grouped_indices(lengths, 2, 3, generator=seeded()) == order, "the generator decides"


@pytest.mark.parametrize("grouped", [True, False])
def test_sampler_walks_the_order_and_draws_a_new_one_each_time(grouped):
    lengths = [i if i % 2 else -i for i in range(40)]
    sampler = LengthGroupedSampler(2, 2, lengths=lengths, generator=seeded(), group_by_modality=grouped)
    first, second = list(sampler), list(sampler)
    assert len(sampler) == 40
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    order = get_modality_length_grouped_indices if grouped else get_length_grouped_indices
    assert first == order(lengths, 2, 2, generator=seeded())


def test_sampler_without_lengths_is_refused():
    with pytest.raises(ValueError, match="needs lengths"):
        LengthGroupedSampler(2, 2)


def test_datasets_return_their_lengths_under_our_name_or_llavas():
    ours, theirs = (
        SimpleNamespace(lengths=[3, 4], has_image=[True, False]),
        SimpleNamespace(modality_lengths=[3, -4]),
    )
    assert tuple(map(list, get_examples(ours))) == tuple(map(list, get_examples(theirs))) == ([3, 4], [True, False])
    assert len(ModalityLengthGroupedSampler(*get_examples(theirs), batch_size=1, world_size=1)) == 2
