"""The order of examples: properties on random inputs, and a small case by hand."""

import random

import pytest
import torch

from llava_lite.data.errors import DataError
from llava_lite.data.sampler import GroupSampler, ModalityLengthGroupedSampler, modality_length_groups


def random_case(seed):
    rng = random.Random(seed)
    num = rng.choice([0, 1, 5, 40, 200, 333])
    fraction = rng.choice([0.0, 0.1, 0.5, 1.0])
    lengths = [rng.choice([0, 1, rng.randint(1, 2048)]) for _ in range(num)]
    return lengths, [rng.random() < fraction for _ in range(num)], rng.randint(1, 8), rng.randint(1, 8)


def groups(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("seed", range(60))
def test_order_is_a_permutation_in_batches_of_one_kind_and_near_equal_length(seed):
    lengths, has_image, batch_size, world_size = random_case(seed)
    sampler = ModalityLengthGroupedSampler(lengths, has_image, batch_size, world_size, seed=seed)
    order, global_size = list(sampler), batch_size * world_size
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    num_full = sum(has_image) // global_size + (len(lengths) - sum(has_image)) // global_size
    for batch in groups(order, global_size)[:num_full]:
        assert len({has_image[i] for i in batch}) == 1
        totals = [sum(lengths[i] for i in part) for part in groups(batch, batch_size)]
        # Who is dealt the longest example is never more than that one example ahead.
        assert max(totals) - min(totals) <= max(lengths[i] for i in batch)
    mixed = [batch for batch in groups(order, global_size) if len({has_image[i] for i in batch}) == 2]
    assert len(mixed) <= 1


def test_what_is_left_over_comes_last_and_every_rank_agrees():
    lengths, has_image = [9, 8, 7, 6, 5, 4, 3], [True, True, True, False, False, False, False]
    generator = torch.Generator().manual_seed(5)
    order = modality_length_groups(lengths, has_image, 1, 2, generator)
    assert [has_image[i] for i in order[6:]] == [True]
    assert all(has_image[a] == has_image[b] for a, b in groups(order[:6], 2))
    torch.manual_seed(99)  # the global generator has no effect
    assert order == modality_length_groups(lengths, has_image, 1, 2, torch.Generator().manual_seed(5))


def test_epochs_differ_and_come_back():
    sampler = ModalityLengthGroupedSampler(range(64), [True] * 64, 2, 4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sampler.order(1)[10:] == second[10:]
    other = ModalityLengthGroupedSampler(range(64), [True] * 64, 2, 4, seed=4)
    assert list(other) not in (first, second)


def test_a_global_batch_is_dealt_longest_first_to_who_has_least():
    # 9 to the first, 7 to the second, 6 to the second (7 < 9), which is full; 1 to the first: 10 against 13.
    order = modality_length_groups([1, 9, 6, 7], [False] * 4, 2, 2, torch.Generator())
    assert order == [1, 0, 3, 2]


def test_lengths_must_be_as_many_as_kinds():
    with pytest.raises(ValueError, match="3 lengths but 2 entries of has_image"):
        modality_length_groups([1, 2, 3], [True, False], 1, 1, torch.Generator())


@pytest.mark.parametrize("seed", range(30))
def test_groups_share_no_batch_and_every_record_comes(seed):
    rng = random.Random(seed)
    batch_size, world_size = rng.randint(1, 4), rng.randint(1, 4)
    size = batch_size * world_size
    names = [name for name in "abc" for _ in range(size + rng.randint(0, 40))]
    rng.shuffle(names)
    lengths = [rng.randint(1, 2048) for _ in names]
    sampler = GroupSampler(lengths, names, batch_size, world_size, seed=seed)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert set(order) == set(range(len(names)))
    assert all(len({names[i] for i in batch}) == 1 for batch in groups(order, size))
    # What comes twice fills the last batch of its group.
    assert len(order) - len(names) == sum(-names.count(name) % size for name in "abc")
    assert sampler.order(3)[size:] == GroupSampler(lengths, names, batch_size, world_size, seed=seed).order(3)[size:]
    assert sampler.order(0) != sampler.order(1)


def test_a_group_smaller_than_a_global_batch_is_refused():
    with pytest.raises(DataError, match="the group 'b' of META has 3 records, and a step trains on 4 of one group"):
        GroupSampler(range(8), list("aaaaabbb"), 2, 2)
    assert len(GroupSampler(range(8), list("aaaaabbb"), 1, 3)) == 9
