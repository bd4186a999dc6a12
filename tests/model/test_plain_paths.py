"""The switch between a model's faster paths and its plain ones."""

import copy

import pytest
from torch import nn

from llava_lite.arguments import ModelArguments, parse_args
from llava_lite.model.plain_paths import PLAIN_PATHS, set_plain_paths


class Part(nn.Module):
    """Something with a faster path."""

    plain_paths = frozenset()


def test_every_part_that_has_a_faster_path_is_told_and_others_are_not():
    inner, other = Part(), nn.Linear(1, 1)
    model = nn.Sequential(nn.Sequential(inner), other)
    set_plain_paths(model, ["rows", "loss"])
    assert inner.plain_paths == {"rows", "loss"}
    assert copy.deepcopy(model)[0][0].plain_paths == {"rows", "loss"}
    assert not hasattr(other, "plain_paths")
    assert Part().plain_paths == frozenset()
    set_plain_paths(model, ())
    assert inner.plain_paths == frozenset()


def test_whole_model_is_told():
    from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel

    assert LlavaMetaForCausalLM.plain_paths == LlavaMetaModel.plain_paths == frozenset()


def test_unknown_path_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown plain path 'layer'; known: layers, rows, loss, experts"):
        set_plain_paths(nn.Linear(1, 1), ["layer"])


def test_flag_names_the_same_paths(tmp_path):
    field = ModelArguments.__dataclass_fields__["plain_paths"]
    assert tuple(field.metadata["choices"]) == PLAIN_PATHS
    model_args, _, _ = parse_args(["--output_dir", str(tmp_path), "--plain_paths", "layers", "rows"])
    assert model_args.plain_paths == ["layers", "rows"]
    with pytest.raises(SystemExit):
        parse_args(["--output_dir", str(tmp_path), "--plain_paths", "layer"])
