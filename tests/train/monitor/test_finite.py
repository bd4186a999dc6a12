"""Weights and optimizer state that are not finite are found and named."""

import math

import pytest
import torch

from llava_lite.checkpoints.copying import clear_fill
from llava_lite.train.monitor.finite import find_in, find_in_each, find_non_finite, list_names

BAD = [float("nan"), float("inf"), float("-inf")]


def stepped(optimizer_class=torch.optim.AdamW, **settings):
    """Return a model of which the bias is frozen, and an optimizer after a step."""
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = optimizer_class([model.weight], lr=0.1, **settings)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("value", BAD)
def test_a_trained_weight_is_named(value):
    model, optimizer = stepped()
    assert find_non_finite(model, optimizer) == []
    with torch.no_grad():
        model.weight[2, 1] = value
    assert find_non_finite(model, optimizer) == ["weight"]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_optimizer_state_is_named_with_its_weight(kind, value):
    model, optimizer = stepped()
    optimizer.state[model.weight][kind][0, 0] = value
    assert find_non_finite(model, optimizer) == [f"{kind} of weight"]


def test_a_float32_shard_that_the_model_has_not_is_checked_too():
    model, _ = stepped()
    shard = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([shard])
    shard.sum().backward()
    optimizer.step()
    shard.data[3] = float("nan")
    assert find_non_finite(model, optimizer) == ["shard 0 of the float32 weights"]


def test_frozen_weights_are_those_of_the_base_model_and_not_checked():
    model, optimizer = stepped(torch.optim.SGD)
    model.bias.data[0] = float("nan")
    assert find_non_finite(model, optimizer) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((4,), 3e38),
        torch.full((4,), 60000.0, dtype=torch.float16),
        torch.tensor(float("inf")),
        torch.zeros(0),
        torch.arange(3),
    ],
    ids=["huge", "half", "count", "empty", "integers"],
)
def test_large_numbers_counts_and_integers_are_no_fault(tensor):
    assert find_in([("it", tensor)]) == []


def test_infinities_of_both_signs_do_not_cancel():
    assert find_in([("it", torch.tensor([float("inf"), float("-inf")]))]) == ["it"]


def test_many_names_are_counted():
    assert list_names(list("abcdef")) == "a, b, c, d and 2 more"
    assert list_names(["a"]) == "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", BAD)
def test_one_after_the_other_every_bad_number_is_found_wherever_it_is(value, dtype):
    tensors = {str(place): torch.ones(7, 301).to(dtype) for place in (0, 1000, 2106)} | {
        "good": torch.ones(9).to(dtype)
    }
    for place in (0, 1000, 2106):
        tensors[str(place)].view(-1)[place] = value
    assert find_in_each(tensors.items(), dtype) == ["0", "1000", "2106"]


def test_one_after_the_other_whole_numbers_empty_tensors_and_those_out_of_memory_are_left_out():
    named = {
        "quantised": torch.full((4,), 255, dtype=torch.uint8),
        "empty": torch.zeros(0),
        "on disk": torch.empty(4, device="meta"),
        "one number": torch.tensor(float("nan")),
    }
    assert find_in_each(named.items(), torch.float32) == ["one number"]


def test_a_number_is_finite_or_not_in_the_dtype_that_is_asked_for():
    large = [("large", torch.tensor([-70_000.0, 1.0]))]
    assert find_in_each(large, torch.float32) == []
    assert find_in_each(large, torch.float16) == ["large"]


@pytest.mark.parametrize(("rank", "num_own"), [(0, 4), (1, 3), (2, 0)])
def test_the_fill_of_a_part_of_zero3_is_not_looked_at_and_can_be_cleared(monkeypatch, rank, num_own):
    # 7 numbers on 3 ranks, 4 a rank: the second has one more than the weight, the third has nothing of it.
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: {"of this weight": rank}[group])
    model = torch.nn.Linear(7, 1, bias=False)
    weight = model.weight
    weight.ds_tensor, weight.ds_numel, weight.ds_process_group = torch.full((4,), math.nan), 7, "of this weight"
    weight.ds_tensor[:num_own] = 1.0
    assert find_non_finite(model) == []
    clear_fill([weight])
    assert weight.ds_tensor.tolist() == [1.0] * num_own + [0.0] * (4 - num_own)
    if num_own:
        weight.ds_tensor[num_own - 1] = math.inf
        assert find_non_finite(model) == ["weight"]
