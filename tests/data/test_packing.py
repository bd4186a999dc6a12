"""Packs: every record in one, none over the budget, full, and the same wherever they are made."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_lite.data import packing
from llava_lite.data.errors import DataError
from llava_lite.data.packing import PackSampler, check_pack_lengths, pack


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.randint(1, rng.choice([10, 90])) for _ in range(rng.choice([0, 1, 7, 300, 1000]))]


@pytest.mark.parametrize("seed", range(30))
def test_every_record_is_in_one_pack_and_none_is_over_the_budget(seed, monkeypatch):
    # Small, so that several windows are put together.
    monkeypatch.setattr(packing, "WINDOW", 64)
    lengths = random_lengths(seed)
    packs = pack(lengths, 100, seed)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in members) for members in packs]
    assert max(sums, default=0) <= 100
    # First fit: within a window no pack fits wholly into an earlier one, so at most one is half empty.
    assert sum(total <= 50 for total in sums) <= max(1, -(-len(lengths) // 64))


def test_the_longest_come_first_each_into_the_first_pack_with_room():
    # 6 and 4, 5 and 5, 3; the drawn order breaks the tie between the two of 5.
    packs = pack([5, 4, 3, 6, 5], 10)
    assert [sorted([5, 4, 3, 6, 5][i] for i in members) for members in packs] == [[4, 6], [5, 5], [3]]


def test_packs_of_a_drawn_mixture_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = np.minimum(575 + rng.lognormal(5.2, 0.6, 20_000).clip(30, 1400), 2048).astype(int)
    # Of text alone.
    lengths[::16] = rng.lognormal(6.7, 0.8, 1250).clip(50, 2048)
    for budget, least in ((4096, 0.95), (8192, 0.975), (16384, 0.99)):
        assert lengths.sum() / (len(pack(lengths, budget)) * budget) > least


def test_ranks_agree_and_seeds_differ():
    lengths = [1 + i % 30 for i in range(200)]
    torch.manual_seed(1)
    first = PackSampler(lengths, 100, seed=5)
    torch.manual_seed(2)  # the global generator has no effect
    assert list(first) == list(PackSampler(lengths, 100, seed=5))
    assert sorted(first) != sorted(PackSampler(lengths, 100, seed=6))


def test_epochs_have_the_same_packs_in_another_order_and_come_back():
    sampler = PackSampler(range(1, 90), 100, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(sampler) == len(first) == len(second)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sampler.order(1)[5:] == second[5:]


def test_a_record_longer_than_a_pack_is_named():
    records = [SimpleNamespace(name=f"record {name!r}") for name in "abc"]
    dataset = SimpleNamespace(lengths=np.array([5, 12, 11]), annotations=records)
    with pytest.raises(
        DataError, match=r"record 'b' has 12 tokens but a pack holds 10; 2 of 3 records are too long.*to 12,"
    ):
        check_pack_lengths(dataset, 10)
    check_pack_lengths(dataset, 12)
