"""LLaMA-Adapter V2: hand-made checkpoints in its key names and shapes become our weights and releases again."""

import argparse

import pytest
import torch
from toy_originals import (
    ADAPTER_PARAMS,
    HEADS,
    PROJECTION,
    PROMPTS,
    QUERY_DEPTH,
    QUERY_WIDTH,
    VOCAB,
    adapter_full,
    adapter_release,
)

from llava_lite.formats import llama_adapter
from llava_lite.formats.llama_adapter import config_from, peer_name, release, weights_from, weights_to
from llava_lite.formats.llama_shapes import lora_fields

LINEARS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {"mm_query_heads": 4, "vocab_size": VOCAB}


def opened(state, **options):
    config = config_from(ADAPTER_PARAMS, state, **(OPTIONS | options))
    return config, weights_from(state, config)


@pytest.mark.parametrize(
    ("kind", "biases", "new_gate"), [("BIAS", LINEARS, False), ("LORA-BIAS", LINEARS, True), ("CAPTION", None, False)]
)
def test_kind_is_told_by_the_keys(kind, biases, new_gate):
    config, weights = opened(adapter_release(kind))
    expected = {
        "model_type": "llava_llama",
        "mm_injection": "adaption_prompt",
        "adaption_prompt_len": PROMPTS,
        "adaption_prompt_layers": 2,
        "adaption_prompt_new_gate": new_gate,
        "adaption_prompt_lora": False,
        "mm_text_only": "blank",
        "decoder_bias": biases,
        "mm_projector_type": "query_vit",
        "mm_query_len": PROMPTS,
        "mm_query_hidden": QUERY_WIDTH,
        "mm_query_depth": QUERY_DEPTH,
        "mm_query_heads": 4,
        "mm_query_mlp_ratio": 2.0,
        "mm_hidden_size": PROJECTION,
        "mm_vision_projection": True,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
        "image_channels": "bgr",
        "conv_template": "alpaca",
        "vocab_size": VOCAB,
    }
    assert {key: config[key] for key in expected} == expected
    rank = 3 if kind == "LORA-BIAS" else None
    assert (lora_fields(weights) or {}).get("lora_alpha") == rank
    # The first of three layers has no prompts, and its gate does nothing.
    gates = {name for name in weights if "adaption_gate" in name}
    assert gates == {f"model.layers.{i}.self_attn.adaption_gate" for i in (1, 2)}


def test_weights_have_our_names_and_the_very_numbers():
    state = adapter_release("LORA-BIAS")
    _, weights = opened(state)
    same = {
        "model.adaption_prompt.query": "adapter_query.weight",
        "model.mm_projector.query": "visual_query.weight",
        "model.mm_projector.input_proj.weight": "clip_proj.weight",
        "model.mm_projector.input_norm.bias": "clip_proj_norm.bias",
        "model.mm_projector.blocks.1.attn.qkv.weight": "visual_blocks.1.attn.qkv.weight",
        "model.mm_projector.blocks.0.mlp.fc2.bias": "visual_blocks.0.mlp.fc2.bias",
        "model.mm_projector.output_proj.bias": "visual_proj.bias",
        "model.mm_projector.output_norm.weight": "visual_proj_norm.weight",
        "model.norm.weight": "llama.norm.weight",
        "model.layers.2.input_layernorm.weight": "llama.layers.2.attention_norm.weight",
        "model.layers.2.mlp.gate_proj.bias": "llama.layers.2.feed_forward.w1.bias",
        "model.layers.2.mlp.up_proj.bias": "llama.layers.2.feed_forward.w3.bias",
        "model.layers.2.mlp.down_proj.lora_B.weight": "llama.layers.2.feed_forward.lora_w2_l2.weight",
        "model.layers.2.self_attn.v_proj.lora_B.weight": "llama.layers.2.attention.lora_wv_l2.weight",
        "model.layers.2.self_attn.k_proj.lora_A.weight": "llama.layers.2.attention.lora_wk_l1.weight",
    }
    for ours, theirs in same.items():
        assert weights[ours].data_ptr() == state[theirs].data_ptr(), ours
        assert peer_name(ours) == theirs
    assert torch.equal(
        weights["model.layers.1.self_attn.adaption_gate"], state["llama.layers.1.attention.gate"].flatten()
    )
    # Four heads of eight rows: of each head the even rows, then the odd ones.
    order = [8 * head + row for head in range(4) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    for ours, theirs in (
        ("q_proj.bias", "wq.bias"),
        ("q_proj.lora_B.weight", "lora_wq_l2.weight"),
        ("k_proj.lora_B.weight", "lora_wk_l2.weight"),
    ):
        rows = state[f"llama.layers.1.attention.{theirs}"]
        assert torch.equal(weights[f"model.layers.1.self_attn.{ours}"], rows[order])


@pytest.mark.parametrize("kind", ["BIAS", "LORA-BIAS", "CAPTION"])
def test_a_release_is_written_back_bit_for_bit(kind):
    state = {name: w.half() if "norm" in name else w for name, w in adapter_release(kind).items()}
    config, weights = opened({"model": state, "config": {}})
    written = release(weights, config)
    assert written["model"].keys() == state.keys()
    for name, tensor in state.items():
        assert written["model"][name].dtype == tensor.dtype
        assert torch.equal(written["model"][name], tensor), name
    assert written["config"] == {
        "w_bias": kind != "CAPTION",
        "w_lora": kind == "LORA-BIAS",
        "lora_rank": [16, 3]["LORA" in kind],
    }


@pytest.mark.parametrize("prefix", ["llma.", "llama."])
def test_checkpoint_of_a_run_holds_the_base_and_clip(prefix):
    state = adapter_full("BIAS", prefix=prefix)
    args = argparse.Namespace(batch_size=4, phase="finetune")
    checkpoint = {"model": state, "optimizer": {}, "epoch": 3, "scaler": {}, "args": args}
    vision = {"num_attention_heads": HEADS}
    config, weights = opened(checkpoint, vision_config=vision)
    assert (config["mm_vision_tower"], config["vision_config"]["projection_dim"]) == (None, PROJECTION)
    assert config["vision_config"]["num_attention_heads"] == HEADS
    assert torch.equal(weights["model.embed_tokens.weight"], state[f"{prefix}tok_embeddings.weight"])
    projection = weights["model.vision_tower.vision_tower.visual_projection.weight"]
    assert torch.equal(projection, state["clip.visual.proj"].T)
    assert not any("token_embedding" in name or "logit_scale" in name for name in weights)
    # Written as a release, without the base and CLIP, from the names that PEFT gives in memory.
    in_memory = {f"base_model.model.{name}": w for name, w in weights.items()}
    written = weights_to(in_memory, config)
    assert written.keys() == adapter_release("BIAS").keys()
    assert all(torch.equal(w, state[name.replace("llama.", prefix)]) for name, w in written.items())


def test_names_in_memory_lead_to_the_originals():
    place = "base_model.model.model.layers.0"
    assert peer_name(f"{place}.self_attn.q_proj.lora_A.default.weight") == "llama.layers.0.attention.lora_wq_l1.weight"
    assert peer_name(f"{place}.self_attn.q_proj.base_layer.weight") == "llama.layers.0.attention.wq.weight"
    assert peer_name("model.layers.3.self_attn.adaption_new_gate") == "llama.layers.3.attention.new_gate"
    assert peer_name("lm_head.weight") == "llama.output.weight"
    tower = "model.vision_tower.vision_tower."
    assert peer_name(f"{tower}vision_model.pre_layrnorm.bias") == "clip.visual.ln_pre.bias"
    packed = "clip.visual.transformer.resblocks.0.attn.in_proj_weight"
    assert peer_name(f"{tower}vision_model.encoder.layers.0.self_attn.k_proj.weight") == packed
    with pytest.raises(ValueError, match=r"no weight for 'model\.image_newline'"):
        peer_name("model.image_newline")


@pytest.mark.parametrize(
    ("params", "options", "words"),
    [
        ({"dim": 64, "n_heads": 8}, {}, r"visual_proj.weight has shape \(32, 16\) and \(64, 16\) is expected"),
        ({"n_heads": 8}, {}, r"adaption_gate has shape \(4,\) and the base, .* 8 heads .* expects \(8,\)"),
        ({"n_layers": 4}, {}, "of 3 layers and the base has 4"),
        ({"n_layers": 1}, {}, "6 prompts, 3 a layer, is for 2 layers, and the base has 1"),
        ({"multiple_of": 256}, {}, r"has shape \(96,\) .* expects \(256,\)"),
        ({"vocab_size": 32000}, {}, f"vocabulary of 32000, .* have {VOCAB}"),
        ({}, {"adaption_prompt_len": 10}, "adaption_prompt_len is 3 in the checkpoint and 10 was asked for"),
        ({}, {"query_layer": 31}, "adaption_prompt_layers is 2 in the checkpoint and 31"),
        ({}, {"mm_query_heads": 5}, "16 wide, which 5 heads do not divide"),
    ],
)
def test_another_base_is_refused_with_both_numbers(params, options, words):
    with pytest.raises(ValueError, match=words):
        config_from(ADAPTER_PARAMS | params, adapter_release("BIAS"), **(OPTIONS | options))


def test_embeddings_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=f"embeddings have {VOCAB} rows and vocab_size is 32000"):
        config_from(ADAPTER_PARAMS, adapter_full("BIAS"), vocab_size=32000)
    assert config_from(ADAPTER_PARAMS, adapter_release("BIAS"))["vocab_size"] == 32000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.weight": torch.zeros(1)}, r"\['extra\.weight'\] .*not known"),
        ({"clip.other": torch.zeros(1)}, r"\['clip\.other'\] .*not known"),
        ({"llama.layers.0.attention.wx.weight": torch.zeros(1)}, r"not of Meta's LLaMA layout.*wx"),
        ({"visual_blocks.0.ls1.gamma": torch.zeros(1)}, r"not known \['visual_blocks\.0\.ls1\.gamma'\]"),
        ({"clip_proj.bias": None}, r"missing \['clip_proj\.bias'\]"),
        ({"visual_blocks.0.norm1.weight": None}, r"missing \['visual_blocks\.0\.norm1\.weight'\]"),
        ({"adapter_query.weight": None}, r"\['adapter_query\.weight'\] .*missing"),
        ({"llama.layers.1.attention.gate": None}, r"missing.*llama\.layers\.1\.attention\.gate"),
        ({"llama.layers.1.attention.wq.bias": None}, r"missing.*llama\.layers\.1\.attention\.wq\.bias"),
        ({"llama.layers.1.attention.wq.weight": torch.zeros(32, 32)}, r"incomplete.*missing"),
        ({f"llama.layers.{i}.attention.gate": None for i in range(3)}, r"adaption_gate.*missing"),
    ],
)
def test_every_key_is_accounted_for(change, words):
    config = config_from(ADAPTER_PARAMS, adapter_release("BIAS"), **OPTIONS)
    state = {name: w for name, w in (adapter_release("BIAS") | change).items() if w is not None}
    with pytest.raises(ValueError, match=words):
        weights_from(state, config)


def test_biases_that_the_config_lacks_are_refused():
    config = config_from(ADAPTER_PARAMS, adapter_release("CAPTION"), **OPTIONS)
    with pytest.raises(ValueError, match=r"with a bias are \['q_proj', .*decoder_bias of the config is \[\]"):
        weights_from(adapter_release("BIAS"), config)


def test_what_a_release_has_no_place_for_is_not_written():
    config, weights = opened(adapter_release("BIAS"))
    with pytest.raises(ValueError, match=r"\['model\.image_newline'\] .*not known"):
        weights_to(weights | {"model.image_newline": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"\['model\.mm_projector\.query'\] .*missing"):
        weights_to({name: w for name, w in weights.items() if name != "model.mm_projector.query"}, config)


def test_tower_of_another_width_is_refused():
    state = adapter_full("BIAS")
    state["clip.visual.proj"] = torch.zeros(32, 24)
    with pytest.raises(ValueError, match="CLIP projects to a width of 24 and the connector reads 20"):
        config_from(ADAPTER_PARAMS, state, mm_query_heads=4)


def test_released_tower_has_its_name():
    assert llama_adapter.clip_fields({}, 768) == {"mm_vision_tower": "openai/clip-vit-large-patch14"}
    assert llama_adapter.claims({"model": adapter_release("BIAS")})
    assert not llama_adapter.claims({"prefix_query.weight": None})
