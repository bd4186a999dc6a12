"""How many layers are checkpointed for the memory that there is."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_lite.train.estimate.checkpointing import (
    choose_checkpointing,
    fewest_checkpointed,
)
from llava_lite.train.estimate.memory import GIB, activation_bytes, gib, layer_activation_bytes, loss_bytes


@pytest.fixture
def room(monkeypatch):
    """Return a function: bytes -> the device has so many to fill."""
    import llava_lite.train.estimate.checkpointing as checkpointing

    return lambda num_bytes: monkeypatch.setattr(checkpointing, "usable_bytes", lambda *args: num_bytes)


def run_args(**more):
    """Return the arguments of a run that the decision reads."""
    base = {"packing": "none", "per_device_train_batch_size": 4, "model_max_length": 200, "uses_deepspeed": False}
    base |= {"device": torch.device("cpu"), "zero_stage": 0, "world_size": 1, "gradient_checkpointing": False}
    base["auto_checkpointing"] = True
    return SimpleNamespace(**base | {"bf16": False, "fp16": False} | more)


def gradients_of(model, ids):
    """Return the gradients of a loss over ids."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_fewest_layers_that_fit_are_chosen():
    assert [
        fewest_checkpointed(4, lambda number: 100 - 10 * number, budget) for budget in (100, 99, 75, 61, 60, 5)
    ] == [
        0,
        1,
        3,
        4,
        4,
        4,
    ]


def test_loss_is_that_of_the_device_of_the_run(toy_model, room, caplog):
    room(100 * GIB)
    model, dataset = toy_model().train(), SimpleNamespace(lengths=np.array([10**6]))
    with caplog.at_level(logging.INFO, logger="llava_lite.train.estimate.checkpointing"):
        choose_checkpointing(model, dataset, run_args(per_device_train_batch_size=1))
    weights = sum(p.numel() * 4 * 4 for p in model.parameters())
    needed = weights + activation_bytes(model, 10**6, 4) + loss_bytes(model, 10**6, 4, "cpu")
    assert f"{gib(needed)} of 100.00 GiB" in caplog.text


def test_the_decision_is_logged_with_its_sum_and_changes_no_gradient(toy_model, room, caplog):
    dataset, model = SimpleNamespace(lengths=np.array([100, 200])), toy_model().train()
    ids = torch.randint(3, 100, (1, 30))
    expected = gradients_of(model, ids)
    weights = sum(p.numel() * 4 * 4 for p in model.parameters())
    layer = 800 * layer_activation_bytes(model.model.layers[0], model.config, 4)
    of_loss = loss_bytes(model, 800, 4)
    for num_bytes, chosen in ((GIB, 0), (weights + of_loss + 3.6 * layer, 1), (weights + of_loss + 2.6 * layer, 2)):
        room(num_bytes)
        with caplog.at_level(logging.INFO, logger="llava_lite.train.estimate.checkpointing"):
            assert choose_checkpointing(model, dataset, run_args()) == chosen
        assert f"{chosen} of 4 layers" in caplog.text
        assert [layer.gradient_checkpointing for layer in model.model.layers].count(True) == chosen
        assert all(ours.equal(theirs) for ours, theirs in zip(gradients_of(model, ids), expected, strict=True))
    caplog.clear()
    room(weights / 2)
    assert choose_checkpointing(model, dataset, run_args()) == 4
    assert "expect to run out of it" in caplog.text


def test_flag_without_auto_is_all_layers_or_none(toy_model):
    model = toy_model()
    for flag, chosen in ((False, 0), (True, 4)):
        args = run_args(auto_checkpointing=False, gradient_checkpointing=flag)
        assert choose_checkpointing(model, None, args) == chosen
