"""Meta's LLaMA layout: a forward pass in Meta's convention, written out here, against transformers' own Llama."""

import math

import pytest
import torch
from torch.nn import functional as F
from toy_originals import PARAMS, VOCAB, meta_state
from transformers import LlamaConfig, LlamaForCausalLM

from llava_lite.formats.llama_shapes import biased_linears, check_shapes, lora_fields
from llava_lite.formats.meta_llama import config_from_params, to_halves, to_pairs, weights_from, weights_to


def rotate_pairs(x, theta=10000.0):  # [T, H, d]
    """Rotate dimensions (0, 1), (2, 3), ... of each head by position * theta ** (-2 i / d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    even, odd, (cos, sin) = x[..., ::2], x[..., 1::2], (angle.cos()[:, None], angle.sin()[:, None])
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def meta_logits(state, params, ids):
    """Return logits [T, V] as LLaMA's paper says, in Meta's order of rows; with biases and LoRA if there are some."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[f"{name}.weight"]

    def linear(x, place, name):
        out = F.linear(x, state[f"{place}.{name}.weight"], state.get(f"{place}.{name}.bias"))
        if f"{place}.lora_{name}_l1.weight" in state:
            out = out + x @ state[f"{place}.lora_{name}_l1.weight"].T @ state[f"{place}.lora_{name}_l2.weight"].T
        return out

    heads, keys = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    hidden = state["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for layer in range(params["n_layers"]):
        place = f"layers.{layer}"
        x = norm(hidden, f"{place}.attention_norm")
        q, k, v = (
            linear(x, f"{place}.attention", name).unflatten(-1, (number, -1))
            for name, number in (("wq", heads), ("wk", keys), ("wv", keys))
        )
        q, k = (rotate_pairs(part, params.get("rope_theta", 10000.0)) for part in (q, k))
        k, v = (part.repeat_interleave(heads // keys, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + linear(mixed, f"{place}.attention", "wo")
        x, ffn = norm(hidden, f"{place}.ffn_norm"), f"{place}.feed_forward"
        hidden = hidden + linear(F.silu(linear(x, ffn, "w1")) * linear(x, ffn, "w3"), ffn, "w2")
    return norm(hidden, "norm") @ state["output.weight"].T


def merge_additions(weights, model):
    """Put weights into transformers' Llama: LoRA added to its matrix, biases as parameters of their own."""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        place = name.removesuffix(".lora_A.weight")
        weights[f"{place}.weight"] = weights[f"{place}.weight"] + weights.pop(f"{place}.lora_B.weight") @ weights.pop(
            name
        )
    for name in [name for name in weights if name.endswith(".bias")]:
        module = model.get_submodule(name.removesuffix(".bias"))
        module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("extras", [(), ("bias", "lora")], ids=["plain", "bias_lora"])
@pytest.mark.parametrize("keys", [None, 4, 2, 1])
def test_logits_are_those_of_metas_formula(keys, extras):
    params = PARAMS | {"n_kv_heads": keys, "rope_theta": 500.0}
    state = meta_state(params, extras=extras)
    ids = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(1))
    model = LlamaForCausalLM(LlamaConfig(**config_from_params(params, VOCAB)))
    weights = weights_from(state, 4, keys)
    assert weights.keys() == {*model.state_dict(), *(name for name in weights if "lora" in name or "bias" in name)}
    with torch.no_grad():
        found = merge_additions(weights, model)(ids[None]).logits[0]
    # Sums of 96 products of size 1 to 10 in another order.
    torch.testing.assert_close(found, meta_logits(state, params, ids), atol=2e-4, rtol=1e-4)


def test_rows_of_a_head_are_written_out():
    rows = torch.arange(12)[:, None].expand(12, 2)
    # Two heads of six rows: even rows, then odd rows.
    assert to_halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(to_pairs(to_halves(rows, 2), 2), rows)


@pytest.mark.parametrize("keys", [None, 2])
def test_way_back_is_bit_for_bit(keys):
    state = meta_state(PARAMS | {"n_kv_heads": keys}, extras=("bias", "lora", "gate"))
    weights = weights_from({f"llama.{name}": w for name, w in state.items()}, 4, keys, prefix="llama.")
    back = weights_to(weights, 4, keys, prefix="llama.")
    del state["rope.freqs"]
    assert back.keys() == {f"llama.{name}" for name in state}
    assert all(torch.equal(back[f"llama.{name}"], w) for name, w in state.items())
    accessory = weights_to(weights, 4, keys, spelling="accessory")
    assert torch.equal(accessory["layers.1.attention.wq.lora_b.weight"], state["layers.1.attention.lora_wq_l2.weight"])


def test_what_no_rotation_touches_is_a_view():
    state = meta_state()
    weights = weights_from(state, 4)
    assert (
        weights["model.layers.1.mlp.up_proj.weight"].data_ptr() == state["layers.1.feed_forward.w3.weight"].data_ptr()
    )
    assert (
        weights["model.layers.0.self_attn.v_proj.weight"].data_ptr()
        == state["layers.0.attention.wv.weight"].data_ptr()
    )


def test_additions_are_told_by_the_names():
    added = {
        name: w
        for name, w in meta_state(extras=("bias", "lora", "gate")).items()
        if name not in meta_state() and "wk" not in name
    }
    weights = weights_from(added, 4)
    assert weights["model.layers.0.self_attn.adaption_gate"].shape == (4,)
    assert weights["model.layers.1.self_attn.adaption_new_gate"].shape == (1,)
    linears = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert biased_linears(weights) == linears
    expected = {"r": 3, "lora_alpha": 3, "lora_dropout": 0.0, "bias": "none", "target_modules": linears}
    assert lora_fields(weights) == expected
    assert lora_fields(weights_from(meta_state(), 4)) is None


@pytest.mark.parametrize(
    ("params", "inner"),
    [
        # LLaMA 7B, 13B, 65B and LLaMA-2 70B, as their config.json on the Hub say.
        ({"dim": 4096, "multiple_of": 256}, 11008),
        ({"dim": 5120, "multiple_of": 256}, 13824),
        ({"dim": 8192, "multiple_of": 256}, 22016),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ],
)
def test_width_of_an_mlp_is_that_of_the_released_models(params, inner):
    assert config_from_params({**PARAMS, **params}, 32000)["intermediate_size"] == inner


def test_params_become_a_config():
    params = PARAMS | {"n_kv_heads": 2, "rope_theta": 5e5, "norm_eps": 1e-6, "lora_rank": 16}
    config = LlamaConfig(**config_from_params(params, 77))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert (config.num_key_value_heads, config.vocab_size, config.rms_norm_eps) == (2, 77, 1e-6)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert not config.tie_word_embeddings
    assert config_from_params(PARAMS | {"vocab_size": 50})["vocab_size"] == 50
    scaled = LlamaConfig(**config_from_params(PARAMS | {"rope_scaling": 0.25}, 77))
    # Accessory multiplies positions by 0.25.
    assert (scaled.rope_parameters["rope_type"], scaled.rope_parameters["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("params", "vocab", "words"),
    [
        (PARAMS, None, "vocab_size -1"),
        (PARAMS | {"vocab_size": 32000}, 49954, "vocabulary of 32000, .* have 49954"),
        ({"dim": 32, "n_layers": 2}, 40, r"lacks \['n_heads'\]"),
        (PARAMS | {"moe": {}}, 40, r"not known here, \['moe'\]"),
        (PARAMS | {"use_scaled_rope": True}, 40, "Llama 3.1"),
    ],
)
def test_params_that_say_too_little_or_too_much_are_refused(params, vocab, words):
    with pytest.raises(ValueError, match=words):
        config_from_params(params, vocab)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.attention.wz.weight": torch.zeros(2)}, r"not of Meta's LLaMA layout.*wz"),
        ({"layers.1.attention.wv.weight": None}, r"1 are missing.*layers\.1\.attention\.wv\.weight"),
        ({"output.weight": None}, r"missing.*output\.weight"),
        ({"layers.0.ffn_norm.weight": None}, r"missing.*layers\.0\.ffn_norm"),
        ({"layers.0.attention.wq.bias": torch.zeros(32)}, r"missing.*layers\.1\.attention\.wq\.bias"),
        ({f"layers.{i}.attention.lora_wq_l1.weight": torch.zeros(2, 32) for i in (0, 1)}, r"missing.*lora_wq_l2"),
    ],
)
def test_every_key_is_accounted_for(change, words):
    state = {name: w for name, w in (meta_state() | change).items() if w is not None}
    with pytest.raises(ValueError, match=words):
        weights_from(state, 4)


def test_wrong_numbers_of_heads_are_refused_with_both():
    with pytest.raises(ValueError, match=r"wq has 32 rows, 4 heads of 8; wk has 16, which are not 4 heads of 8 but 2"):
        weights_from(meta_state(PARAMS | {"n_kv_heads": 2}), 4)
    with pytest.raises(ValueError, match=r"has 32 rows, which are not 5 heads"):
        weights_from(meta_state(), 5)
    with pytest.raises(ValueError, match=r"gate is of 4 heads and the base has 8"):
        weights_from({"layers.0.attention.gate": torch.zeros(1, 4, 1, 1)}, 8)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dim": 64}, r"\(40, 32\) and the base, with hidden_size 64.*\(40, 64\)"),
        ({"n_layers": 3}, "of 2 layers and the base has 3"),
        ({"vocab_size": 48}, r"\(40, 32\) .*vocabulary of 48"),
        ({"multiple_of": 256}, r"\(96, 32\) .* expects \(256, 32\)"),
    ],
)
def test_weights_of_another_base_are_refused_with_both_numbers(other, words):
    with pytest.raises(ValueError, match=words):
        check_shapes(
            weights_from(meta_state(), 4), config_from_params(PARAMS | other, other.get("vocab_size", 40)), "x"
        )


def test_a_name_without_a_place_is_not_written():
    with pytest.raises(ValueError, match=r"no place for \['model\.mm_projector\.weight'\]"):
        weights_to({"model.mm_projector.weight": torch.zeros(2, 2)}, 2)
