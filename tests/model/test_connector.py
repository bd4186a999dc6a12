"""Connectors by name, with LLaVA's weight names."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.model.connector import build_connector


def config(kind, inside=6, outside=10):
    return SimpleNamespace(mm_projector_type=kind, mm_hidden_size=inside, hidden_size=outside)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_weights_carry_llavas_names(kind, names):
    assert list(build_connector(config(kind)).state_dict()) == names


def test_mlp2x_gelu_is_linear_gelu_linear():
    connector = build_connector(config("mlp2x_gelu"))
    x = torch.randn(3, 6)
    first, second = connector[0], connector[2]
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert torch.allclose(connector(x), hidden @ second.weight.T + second.bias, atol=1e-6)


def test_identity_passes_features_on_and_needs_equal_widths():
    x = torch.randn(2, 6)
    assert build_connector(config("identity", 6, 6))(x) is x
    with pytest.raises(
        ValueError, match="needs a tower as wide as the decoder; got mm_hidden_size 6 and hidden_size 10"
    ):
        build_connector(config("identity"))


@pytest.mark.parametrize("kind", ["mlp3x", "mlp0x_gelu", "mlpNx_gelu", "qformer"])
def test_unknown_names_are_refused_with_the_list(kind):
    with pytest.raises(ValueError, match=f"unknown connector '{kind}'; known: identity, linear, mlpNx_gelu"):
        build_connector(config(kind))
