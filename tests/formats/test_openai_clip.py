"""OpenAI's CLIP image encoder: a forward pass in its names, written out here, against transformers' own class."""

import math

import pytest
import torch
from torch.nn import functional as F
from toy_originals import HEADS, INNER, LAYERS, PATCH, PROJECTION, SIDE, WIDTH, openai_state
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llava_lite.formats.openai_clip import config_from_shapes, is_text, openai_name, weights_from, weights_to


def features(state, pixels, prefix="clip.visual."):
    """Return projected features of all tokens [N, P+1, E], by the formulas of the paper."""
    w = {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2) @ w["conv1.weight"].flatten(1).T
    x = torch.cat([w["class_embedding"].expand(len(pixels), 1, -1), patches], dim=1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}."
        hidden = norm(x, f"{block}ln_1")
        q, k, v = (
            (hidden @ w[f"{block}attn.in_proj_weight"][i * WIDTH : (i + 1) * WIDTH].T
             + w[f"{block}attn.in_proj_bias"][i * WIDTH : (i + 1) * WIDTH]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for i in range(3)
        )  # fmt: skip
        mixed = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        x = x + F.linear(
            mixed.transpose(1, 2).flatten(2), w[f"{block}attn.out_proj.weight"], w[f"{block}attn.out_proj.bias"]
        )
        inner = F.linear(norm(x, f"{block}ln_2"), w[f"{block}mlp.c_fc.weight"], w[f"{block}mlp.c_fc.bias"])
        inner = inner * torch.sigmoid(1.702 * inner)
        x = x + F.linear(inner, w[f"{block}mlp.c_proj.weight"], w[f"{block}mlp.c_proj.bias"])
    return norm(x, "ln_post") @ w["proj"]


def build(state, num_heads=HEADS):
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config_from_shapes(state, num_heads=num_heads)))
    model.load_state_dict(weights_from(state))
    return model.eval()


def test_features_are_those_of_openais_formula():
    state = openai_state()
    pixels = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    model = build(state)
    with torch.no_grad():
        out = model(pixels)
        tokens = model.visual_projection(model.vision_model.post_layernorm(out.last_hidden_state))
        expected = features(state, pixels)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.image_embeds, expected[:, 0], atol=1e-4, rtol=1e-4)


def test_shapes_tell_the_config():
    state = openai_state()
    config = config_from_shapes({name: tuple(w.shape) for name, w in state.items()}, num_heads=HEADS)
    assert config == {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "patch_size": PATCH,
        "image_size": PATCH * SIDE,
        "projection_dim": PROJECTION,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    # A head for every 64 of width, as in all that OpenAI released.
    assert config_from_shapes(openai_state(width=128))["num_attention_heads"] == 2


def test_way_back_is_bit_for_bit_and_names_lead_back():
    state = openai_state("visual.")
    ours = weights_from(state, "visual.")
    back = weights_to(ours, "visual.")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert (
        openai_name("vision_model.encoder.layers.1.self_attn.v_proj.bias")
        == "transformer.resblocks.1.attn.in_proj_bias"
    )
    assert openai_name("vision_model.encoder.layers.0.self_attn.out_proj.weight").endswith("0.attn.out_proj.weight")
    assert openai_name("text_model.x") is None
    with pytest.raises(ValueError, match=r"no place for \['text_model\.x'\]"):
        weights_to({"text_model.x": torch.zeros(1)})


def test_names_of_other_parts_are_left_alone_and_those_of_the_text_encoder_are_known():
    state = openai_state() | {"llama.norm.weight": torch.ones(3)}
    assert weights_from(state).keys() == build(openai_state()).state_dict().keys()
    text = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.bias")
    assert all(is_text(f"clip.{name}") for name in (*text, "transformer.resblocks.0.ln_1.weight"))
    assert not any(map(is_text, ("clip.visual.proj", "transformer.resblocks.0.ln_1.weight", "clip.other")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip.visual.ln_post.bias": None}, r"missing \['ln_post\.bias'\]"),
        (
            {"clip.visual.transformer.resblocks.1.attn.in_proj_bias": None},
            r"missing .*resblocks\.1\.attn\.in_proj_bias",
        ),
        ({"clip.visual.attnpool.k_proj.weight": torch.zeros(1)}, r"not known \['attnpool\.k_proj\.weight'\]"),
    ],
)
def test_every_key_is_accounted_for(change, words):
    state = {name: w for name, w in (openai_state() | change).items() if w is not None}
    for call in (weights_from, config_from_shapes):
        with pytest.raises(ValueError, match=words):
            call(state)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 32, which 5 heads do not divide"):
        config_from_shapes(openai_state(), num_heads=5)
