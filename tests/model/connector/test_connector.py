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


def query_config(**fields):
    sizes = {"len": 3, "hidden": 8, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    return SimpleNamespace(**vars(config("query_vit")), **{f"mm_query_{k}": v for k, v in (sizes | fields).items()})


@torch.no_grad()
def test_query_vit_is_a_transformer_encoder_whose_first_tokens_are_the_queries():
    torch.manual_seed(0)
    connector = build_connector(query_config())
    for weight in connector.parameters():
        weight.normal_()
    features = torch.randn(2, 5, 6)
    hidden = connector.input_norm(features @ connector.input_proj.weight.T + connector.input_proj.bias)
    hidden = torch.cat([connector.query.expand(2, 3, 8), hidden], dim=1)
    for block in connector.blocks:
        # torch's own layer, with its names.
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True).eval()
        names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj"}
        names |= {"mlp.fc1": "linear1", "mlp.fc2": "linear2"}
        state = block.state_dict()
        for own, other in names.items():
            state = {name.replace(own, other): value for name, value in state.items()}
        layer.load_state_dict(state)
        hidden = layer(hidden)
    expected = connector.output_norm(hidden[:, :3] @ connector.output_proj.weight.T + connector.output_proj.bias)
    assert torch.allclose(connector(features), expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@torch.no_grad()
def test_gated_mlps_add_silu_of_one_times_the_other(norm):
    own = SimpleNamespace(**vars(config("gated_mlp2x")), mm_gate_expansion=2, mm_gate_norm=norm)
    connector = build_connector(own)
    for weight in connector.parameters():
        weight.normal_()
    names = {name.split(".")[-2] for name in connector.state_dict() if name.endswith("bias")}
    assert names == ({"proj"} if norm == "rms" else {"proj", "gate_proj", "up_proj", "down_proj", "0", "1"})
    x = torch.randn(3, 1, 6)
    hidden = x @ connector.proj.weight.T + connector.proj.bias
    for scale, mlp in zip(connector.norms, connector.mlps, strict=True):
        if norm == "rms":
            y = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale.weight
        else:
            centred = hidden - hidden.mean(-1, keepdim=True)
            y = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale.weight + scale.bias
        gate, up, down = (
            lambda v, m=m: v @ m.weight.T + (0 if m.bias is None else m.bias)
            for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        hidden = hidden + down(gate(y) / (1 + (-gate(y)).exp()) * up(y))
    assert torch.allclose(connector(x), hidden, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_linear_norm_has_the_names_of_its_original_and_its_formula():
    connector = build_connector(config("linear_norm"))
    assert list(connector.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(2, 6)
    hidden = x @ connector[0].weight.T + connector[0].bias
    centred = hidden - hidden.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(connector(x), expected, atol=1e-5)


def test_query_vit_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match="mm_query_hidden 8 cannot be divided into mm_query_heads 3"):
        build_connector(query_config(heads=3))


@pytest.mark.parametrize("kind", ["mlp3x", "mlp0x_gelu", "mlpNx_gelu", "gated_mlpNx", "gated_mlp2x_gelu", "qformer"])
def test_unknown_names_are_refused_with_the_list(kind):
    with pytest.raises(
        ValueError, match=f"unknown connector '{kind}'; known: gated_mlpNx, identity, linear, linear_norm"
    ):
        build_connector(config(kind))
