"""ImageBind-LLM: hand-made checkpoints in its key names and shapes become our weights and releases again."""

import pytest
import torch
from torch.nn import functional as F
from toy_originals import PARAMS, VOCAB, imagebind_release, meta_state
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llava_lite.formats import imagebind_llm
from llava_lite.formats.imagebind_llm import config_from, peer_name, weights_from, weights_to
from llava_lite.formats.llama_shapes import lora_fields

LINEARS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def opened(state, **options):
    config = config_from(PARAMS, state, **({"vocab_size": VOCAB} | options))
    return config, weights_from(state, config)


@pytest.mark.parametrize(
    ("legacy", "extras", "norm", "biases"),
    [
        (False, ("bias", "lora"), "rms", LINEARS),
        (False, (), "rms", None),
        (True, ("bias", "lora"), "layer", LINEARS),
    ],
    ids=["7B", "pretrained", "legacy"],
)
def test_kind_is_told_by_the_keys_and_written_back_bit_for_bit(legacy, extras, norm, biases):
    state = imagebind_release(legacy, extras)
    config, weights = opened(state)
    expected = {
        "model_type": "llava_llama",
        "mm_injection": "adaption_prompt",
        "adaption_prompt_len": 1,
        "adaption_prompt_layers": 2,
        "adaption_prompt_new_gate": False,
        "mm_text_only": "blank",
        "mm_projector_type": "gated_mlp3x",
        "mm_gate_norm": norm,
        "mm_gate_expansion": 2,
        "mm_hidden_size": 12,
        "mm_vision_tower": "imagebind_huge",
        "mm_vision_select_feature": "pooled",
        "decoder_bias": biases,
        "image_channels": "rgb",
    }
    assert {key: config[key] for key in expected} == expected
    assert (lora_fields(weights) is None) == (not extras)
    written = weights_to(weights, config)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_bind_network_is_gated_mlps():
    state = imagebind_release(legacy=True)
    _, weights = opened(state)
    same = {
        "model.mm_projector.proj.bias": "image_bind_proj.bias",
        "model.mm_projector.norms.0.bias": "image_bind_norm_1.bias",
        "model.mm_projector.mlps.0.gate_proj.weight": "image_bind_f1_1.weight",
        "model.mm_projector.mlps.1.down_proj.weight": "image_bind_f2_2.weight",
        "model.mm_projector.mlps.2.up_proj.bias": "image_bind_f3_3.bias",
        "model.adaption_prompt.query": "prefix_query.weight",
        "model.layers.0.mlp.down_proj.bias": "llama.layers.0.feed_forward.w2.bias",
    }
    for ours, theirs in same.items():
        assert weights[ours].data_ptr() == state[theirs].data_ptr(), ours
        assert peer_name(ours) == theirs
    assert peer_name("model.vision_tower.vision_tower.modality_heads.vision.0.weight") == (
        "image_bind.modality_heads.vision.0.weight"
    )
    with pytest.raises(ValueError, match=r"no weight for 'model\.image_start'"):
        peer_name("model.image_start")


def test_bind_network_computes_the_originals_formula():
    state = {name: w / 8 for name, w in imagebind_release(extras=()).items()}
    _, weights = opened(state)
    features = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))
    x = features @ state["image_bind_proj.weight"].T + state["image_bind_proj.bias"]
    for i in (1, 2, 3):
        n = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"image_bind_norm_{i}.weight"]
        f1, f2, f3 = (state[f"image_bind_f{part}_{i}.weight"] for part in (1, 2, 3))
        x = x + (F.silu(n @ f1.T) * (n @ f3.T)) @ f2.T
    ours = {name.removeprefix("model.mm_projector."): w for name, w in weights.items() if "mm_projector" in name}
    found = F.linear(features, ours["proj.weight"], ours["proj.bias"])
    for i in range(3):
        norm, mlp = LlamaRMSNorm(32, eps=1e-6), LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
        norm.load_state_dict({"weight": ours[f"norms.{i}.weight"]})
        place = f"mlps.{i}."
        mlp.load_state_dict({name.removeprefix(place): w for name, w in ours.items() if name.startswith(place)})
        found = found + mlp(norm(found))
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_checkpoint_of_a_run_holds_the_base_and_imagebind():
    base = {f"llma.{name}": w for name, w in meta_state().items()}
    state = base | {name.replace("llama.", "llma."): w for name, w in imagebind_release().items()}
    encoder = {"image_bind.modality_trunks.vision.blocks.0.norm_1.bias": torch.ones(4)}
    dropped = {"prefix_projector_norm.weight": torch.ones(4), "prefix_projector_norm.bias": torch.ones(4)}
    config, weights = opened({"model": state | encoder | dropped, "epoch": 1})
    assert weights["model.vision_tower.vision_tower.modality_trunks.vision.blocks.0.norm_1.bias"].tolist() == [1] * 4
    assert torch.equal(weights["lm_head.weight"], state["llma.output.weight"])
    written = weights_to(weights, config)
    assert written.keys() == imagebind_release().keys()
    # Without the encoder's keys the same, but for its weights.
    _, without = opened({"model": state})
    assert weights.keys() - without.keys() == {n for n in weights if n.startswith("model.vision_tower.")}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": 64, "n_heads": 8}, r"image_bind_proj.weight has shape \(32, 12\), and \(64, 12\) is expected"),
        ({"n_heads": 8}, r"adaption_gate has shape \(4,\) .* 8 heads"),
        # MU-LLaMA's users met a table of 32 prompts where 20 were expected.
        ({"n_layers": 1}, "a table of 2 prompts, 1 a layer, is for 2 layers, and the base has 1"),
        ({"n_layers": 3}, "of 2 layers and the base has 3"),
        ({"vocab_size": 49954}, f"vocabulary of 49954, .* have {VOCAB}"),
    ],
)
def test_another_base_is_refused_with_both_numbers(params, words):
    with pytest.raises(ValueError, match=words):
        config_from(PARAMS | params, imagebind_release(), vocab_size=VOCAB)


def test_prompts_of_another_length_than_the_config_says_are_refused():
    config, _ = opened(imagebind_release())
    with pytest.raises(ValueError, match=r"query has shape \(2, 32\) .* expects \(1, 32\)"):
        weights_from(imagebind_release(), config | {"adaption_prompt_layers": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": torch.zeros(1)}, r"\['extra'\] .*not known"),
        ({"image_bind_f4_1.weight": torch.zeros(1)}, r"image_bind_f4_1.*not known"),
        ({"image_bind_norm_1.bias": torch.zeros(32)}, r"image_bind_norm_1\.bias.*not known"),
        ({"image_bind_f2_2.weight": None}, r"image_bind_f2_2\.weight.*missing"),
        ({"prefix_query.weight": None}, r"prefix_query\.weight.*missing"),
        ({"llama.layers.1.attention.lora_wo_l2.weight": None}, r"missing.*lora_wo_l2"),
    ],
)
def test_every_key_is_accounted_for(change, words):
    config, _ = opened(imagebind_release())
    state = {name: w for name, w in (imagebind_release() | change).items() if w is not None}
    with pytest.raises(ValueError, match=words):
        weights_from(state, config)


def test_it_is_told_from_the_other_systems():
    assert imagebind_llm.claims({"model": imagebind_release()})
    assert not imagebind_llm.claims(meta_state())
