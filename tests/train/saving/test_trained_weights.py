"""Saved weights go into the model that they were saved from, and into no other."""

import pytest
import torch
from torch import nn

from llava_lite.train.saving.trained_weights import load_trained


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": None}, r"missing \['bias'\] \(1 in all\)"),
        ({"more": torch.ones(1)}, r"unknown \['more'\] \(1\)"),
        ({"weight": torch.ones(1, 2)}, r"other shapes \['weight \(1, 2\) for \(3, 2\)'\] \(1\)"),
    ],
    ids=["missing", "unknown", "another shape"],
)
def test_weights_that_do_not_fit_are_named_and_none_is_copied(change, words):
    model = nn.Linear(2, 3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {name: torch.ones_like(weight) for name, weight in before.items()} | change
    state = {name: weight for name, weight in state.items() if weight is not None}
    with pytest.raises(ValueError, match=f"a.safetensors does not fit what this run trains: .*{words}"):
        load_trained(model, state, "a.safetensors")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
