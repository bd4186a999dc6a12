"""The switch between a model's faster paths and its plain ones."""

import copy

import pytest
import torch
from torch import nn

from llava_lite.constants import IGNORE_INDEX
from llava_lite.model.plain_paths import PLAIN_PATHS, set_plain_paths
from llava_lite.train.arguments.fields import ModelArguments
from llava_lite.train.arguments.parse import parse_args


class Part(nn.Module):
    """Something with a faster path."""

    plain_paths = frozenset()


def test_plain_paths_are_set_on_every_part_that_has_one_and_on_no_other():
    inner, other = Part(), nn.Linear(1, 1)
    model = nn.Sequential(nn.Sequential(inner), other)
    set_plain_paths(model, ["experts", "loss"])
    assert inner.plain_paths == {"experts", "loss"}
    assert copy.deepcopy(model)[0][0].plain_paths == {"experts", "loss"}
    assert not hasattr(other, "plain_paths")
    assert Part().plain_paths == frozenset()
    set_plain_paths(model, ())
    assert inner.plain_paths == frozenset()


def test_the_full_model_has_no_plain_path_by_default():
    from llava_lite.model.llava_arch import LlavaMetaForCausalLM

    assert LlavaMetaForCausalLM.plain_paths == frozenset()


@pytest.mark.parametrize("moe", [None, {"num_experts": [4], "top_k_experts": 2}], ids=["dense", "experts"])
def test_plain_loss_asks_the_vocabulary_everywhere_and_is_the_same(moe, toy_model):
    model = toy_model(moe=moe).train()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, IGNORE_INDEX)
    asked = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    found = []
    for plain in ((), ("loss",)):
        set_plain_paths(model, plain)
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert asked == [10, 18]
    torch.testing.assert_close(*(loss for loss, _ in found), atol=0, rtol=1e-6)
    torch.testing.assert_close(*(gradients for _, gradients in found), atol=1e-6, rtol=1e-5)


def test_unknown_path_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown plain path 'layer'; known: loss, experts, matmul, liger"):
        set_plain_paths(nn.Linear(1, 1), ["layer"])


def test_flag_names_the_same_paths(tmp_path):
    field = ModelArguments.__dataclass_fields__["plain_paths"]
    assert tuple(field.metadata["choices"]) == PLAIN_PATHS
    model_args, _, _ = parse_args(["--output_dir", str(tmp_path), "--plain_paths", "loss", "experts"])
    assert model_args.plain_paths == ["loss", "experts"]
    with pytest.raises(ValueError, match="invalid choice: 'layer'"):
        parse_args(["--output_dir", str(tmp_path), "--plain_paths", "layer"])
