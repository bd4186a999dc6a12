"""The cache with room gives what transformers' own gives, call by call, and copies a position once."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from llava_lite.model.kv_cache import LEAST_ROOM, GrowingCache, GrowingLayer

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


def states(length, seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 2, length, 8, generator=generator).unbind()


def twins():
    return GrowingCache(CONFIG), DynamicCache(config=CONFIG)


def fill(caches, lengths, rows=3):
    """Add positions to each of the caches and return what the last call gave back."""
    for seed, length in enumerate(lengths):
        for layer in range(2):
            given = [cache.update(*states(length, 10 * seed + layer, rows), layer) for cache in caches]
    return given


def assert_equal(grown, stock):
    assert grown.get_seq_length() == stock.get_seq_length()
    assert grown.get_mask_sizes(1, 0) == stock.get_mask_sizes(1, 0)
    for ours, theirs in zip(grown.layers, stock.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_it_is_a_dynamic_cache_that_starts_empty():
    grown, stock = twins()
    assert isinstance(grown, DynamicCache)
    assert [type(layer) for layer in grown.layers] == [GrowingLayer] * 2
    assert grown.get_seq_length() == stock.get_seq_length() == 0
    assert grown.layers[0].keys is None
    assert not grown.is_compileable
    assert grown.is_croppable
    assert grown.get_max_length() == stock.get_max_length() == -1


@pytest.mark.parametrize("lengths", [[5], [5, 1, 1], [1] * 200, [LEAST_ROOM, 3, 300, 1]])
def test_what_is_added_is_given_back_as_transformers_cache_does(lengths):
    grown, stock = twins()
    ours, theirs = fill((grown, stock), lengths)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_equal(grown, stock)


@torch.no_grad()
def test_a_step_writes_into_the_room_and_copies_nothing():
    grown = GrowingCache(CONFIG)
    fill([grown], [20, 1])
    before = grown.layers[0].keys.data_ptr()
    fill([grown], [1] * (LEAST_ROOM - 1))
    assert grown.layers[0].keys.data_ptr() == before
    fill([grown], [1])
    assert grown.layers[0].keys.data_ptr() != before


def changes():
    order = torch.tensor([2, 0, 0])
    return {
        "beams": lambda cache: cache.reorder_cache(order),
        "cropped": lambda cache: cache.crop(-3),
        "cropped by nothing": lambda cache: cache.crop(0),
        "repeated": lambda cache: cache.batch_repeat_interleave(2),
        "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "forgotten": lambda cache: cache.reset(),
    }


@pytest.mark.parametrize("name", changes())
def test_after_every_change_it_goes_on_as_transformers_cache_does(name):
    grown, stock = twins()
    fill((grown, stock), [7, 1])
    for cache in (grown, stock):
        changes()[name](cache)
    if name == "forgotten":
        assert grown.get_seq_length() == 0
        # transformers before 5.23 fills what is there with zeros and goes on behind it.
        stock = DynamicCache(config=CONFIG)
    else:
        assert_equal(grown, stock)
    rows = 3 if name == "forgotten" else len(stock.layers[0].keys)
    fill((grown, stock), [1, 1, 4], rows)
    assert_equal(grown, stock)


@torch.no_grad()
def test_a_cropped_cache_keeps_its_room():
    grown = GrowingCache(CONFIG)
    fill([grown], [20])
    before = grown.layers[0].keys.data_ptr()
    grown.crop(-5)
    fill([grown], [2])
    assert grown.get_seq_length() == 17
    assert grown.layers[0].keys.data_ptr() == before


def test_a_copy_goes_its_own_way():
    grown, stock = twins()
    fill((grown, stock), [6])
    copied = copy.deepcopy(grown)
    fill([copied], [1])
    assert copied.get_seq_length() == 7
    assert_equal(grown, stock)


def test_what_inference_mode_has_filled_goes_on_outside_of_it():
    grown, stock = twins()
    with torch.inference_mode():
        fill((grown, stock), [6, 1])
    fill((grown, stock), [1, 1])
    assert_equal(grown, stock)
    with torch.inference_mode():
        fill((grown, stock), [1])
    assert_equal(grown, stock)


def test_gradients_pass_where_somebody_wants_them():
    grown, stock = twins()
    results = []
    for cache in (grown, stock):
        first, later = (torch.ones(1, 2, 3, 8, requires_grad=True) for _ in range(2))
        cache.update(first, 2 * first, 0)
        keys, values = cache.update(later, 2 * later, 0)
        (keys.square().sum() + values.square().sum()).backward()
        results.append((first.grad, later.grad))
    torch.testing.assert_close(*results)


def test_gradients_pass_where_queries_alone_want_them():
    grown, stock = twins()
    results = []
    for cache in (grown, stock):
        query = torch.ones(1, 2, 1, 8, requires_grad=True)
        first, _ = cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
        early = (query @ first.transpose(2, 3)).sum()
        later, _ = cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
        (early + (query @ later.transpose(2, 3)).sum()).backward()
        results.append(query.grad)
    torch.testing.assert_close(*results)


def test_a_sliding_window_stays_transformers_own():
    cache = GrowingCache(MistralConfig(num_hidden_layers=1, sliding_window=4))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer]
