"""Weights and optimizer state that are not finite are found and named."""

import pytest
import torch

from llava_lite.train.monitor.finite import find_in, find_non_finite, list_names

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
