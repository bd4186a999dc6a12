"""LLaMA2-Accessory: hand-made checkpoints in its key names and shapes become our weights and its own again."""

import pytest
import torch
from toy_originals import HEADS, PARAMS, PROMPTS, VOCAB, accessory_state, adapter_release

from llava_lite.formats import accessory
from llava_lite.formats.accessory import config_from, kind_of, peer_name, weights_from, weights_to
from llava_lite.formats.llama_shapes import lora_fields
from llava_lite.formats.meta_shards import add_difference, merge_shards

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIVE = [linear for linear in SEVEN if linear not in ("k_proj", "v_proj")]
OPTIONS = {"mm_query_heads": 4, "vision_config": {"num_attention_heads": HEADS}}


def opened(state, params=PARAMS, **options):
    config = config_from(params, state, **options)
    return config, weights_from(state, config)


@pytest.mark.parametrize(("kind", "biases"), [("llama_qformerv2", None), ("llama_qformerv2_peft", SEVEN)])
def test_qformer_models_put_images_in_front(kind, biases):
    state = accessory_state(kind)
    assert kind_of(state) == kind
    config, weights = opened({"model": state})
    expected = {
        "model_type": "llava_llama",
        "mm_injection": "tokens",
        "mm_image_position": "front",
        "mm_boundary_vectors": True,
        "mm_projector_type": "linear_norm",
        "mm_hidden_size": 24,
        "mm_vision_tower": "Salesforce/blip2-opt-2.7b",
        "decoder_bias": biases,
        "vocab_size": VOCAB,
        "image_channels": "rgb",
    }
    assert {key: config[key] for key in expected} == expected
    assert not any(key.startswith("adaption") for key in config)
    assert (lora_fields(weights) or {}).get("target_modules") == biases
    same = {
        "model.mm_projector.0.weight": "llma.qformer_proj.0.weight",
        "model.mm_projector.1.bias": "llma.qformer_proj.1.bias",
        "model.image_start": "llma.start_img",
        "model.image_end": "llma.end_img",
        "model.vision_tower.vision_tower.query_tokens": "llma.qformer.query_tokens",
        "model.layers.0.self_attn.o_proj.weight": "llma.layers.0.attention.wo.weight",
    }
    for ours, theirs in same.items():
        assert weights[ours].data_ptr() == state[theirs].data_ptr()
        assert peer_name(ours, config) == theirs
    assert weights["model.image_start"].shape == (32,)


def test_adapter_has_prompts_with_lora_and_no_image_for_a_text():
    state = accessory_state("llama_adapter")
    config, weights = opened(state, **OPTIONS)
    expected = {
        "mm_injection": "adaption_prompt",
        "adaption_prompt_len": PROMPTS,
        "adaption_prompt_layers": 1,
        "adaption_prompt_new_gate": True,
        "adaption_prompt_lora": True,
        "mm_text_only": "bare",
        "mm_projector_type": "query_vit",
        "mm_vision_projection": True,
        "decoder_bias": FIVE,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["vision_config"]["num_attention_heads"] == HEADS
    # The last of two layers has prompts.
    place = "model.layers.1.self_attn.adaption_"
    assert torch.equal(weights[f"{place}gate"], state["llma.prefix_gate"][0])
    assert torch.equal(weights[f"{place}new_gate"], state["llma.prefix_new_gate"])
    assert torch.equal(weights["model.adaption_prompt.query"], state["llma.prefix"][0, 0])
    assert not any("layers.0.self_attn.adaption" in name for name in weights)
    names = {
        f"{place}gate": "llma.prefix_gate",
        f"{place}new_gate": "llma.prefix_new_gate",
        "model.mm_projector.query": "llma.visual_query",
        "model.mm_projector.input_proj.bias": "llma.clip_proj.bias",
        "model.adaption_prompt.query": "llma.prefix",
        "model.layers.0.mlp.up_proj.lora_A.weight": "llma.layers.0.feed_forward.w3.lora_a.weight",
        "model.vision_tower.vision_tower.visual_projection.weight": "llma.clip.visual.proj",
    }
    assert {ours: peer_name(ours, config) for ours in names} == names
    with pytest.raises(ValueError, match=r"no weight for 'model\.image_newline'"):
        peer_name("model.image_newline", config)


def test_prompts_without_an_encoder_are_a_model_of_texts():
    config, weights = opened(accessory_state("llama_adapter", visual=False))
    assert "mm_vision_tower" not in config
    assert config["mm_injection"] == "adaption_prompt"
    assert not any("mm_projector" in name for name in weights)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("kind", ["llama_qformerv2", "llama_qformerv2_peft", "llama_adapter"])
def test_way_back_is_bit_for_bit(kind, with_base):
    state = accessory_state(kind, with_base=with_base)
    options = OPTIONS if kind == "llama_adapter" else {}
    config, weights = opened(state, vocab_size=VOCAB, **options)
    back = weights_to(weights, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_shards_of_ranks_and_a_difference_open_as_one():
    state = accessory_state("llama_adapter")
    halves = [dict(state), dict(state)]
    by_rows = [
        f"{name}.{kind}" for name in ("wq", "wk", "wv", "w1", "w3") for kind in ("weight", "bias", "lora_b.weight")
    ]
    by_columns = [f"{name}.{kind}" for name in ("wo", "w2") for kind in ("weight", "lora_a.weight")]
    for name, tensor in state.items():
        rows = name.endswith((*by_rows, "output.weight"))
        if rows or name.endswith((*by_columns, "tok_embeddings.weight", "prefix_gate")):
            halves[0][name], halves[1][name] = tensor.chunk(2, 0 if rows else 1)
    _, expected = opened(state, **OPTIONS)
    _, weights = opened(merge_shards(halves), **OPTIONS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r"\(40, 16\) and the base, .* expects \(40, 32\)"):
        config_from(PARAMS, halves[0], **OPTIONS)
    difference = {name: torch.ones_like(w) for name, w in state.items() if name.endswith("wo.weight")}
    _, moved = opened(add_difference(state, difference), **OPTIONS)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(moved[name], expected[name] + 1)


def test_plain_models_are_read_and_mixtures_of_encoders_are_refused():
    state = {n: w for n, w in accessory_state("llama_qformerv2_peft").items() if n.startswith("llma.layers.")}
    assert kind_of(state) == "llama_peft"
    full = accessory_state("llama_qformerv2")
    plain = {n: w for n, w in full.items() if "qformer" not in n and "_img" not in n}
    config, weights = opened(plain)
    assert kind_of(plain) == "llama"
    assert weights_to(weights, config).keys() == plain.keys()
    for name, words in (
        ("llma.dinov2_vitg14.cls_token", "SPHINX"),
        ("llma.clip_proj.weight", "CLIP's tokens in front"),
    ):
        with pytest.raises(ValueError, match=words):
            kind_of(full | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="said to be 'llama_adapter' and its keys are of 'llama_qformerv2'"):
        config_from(PARAMS, full, kind="llama_adapter")
    # With bias_tuning false and no LoRA the kind adds nothing.
    assert config_from(PARAMS, full, kind="llama_qformerv2_peft") == config_from(PARAMS, full)


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("llama_qformerv2", {"dim": 64, "n_heads": 8}, r"\(40, 32\) and the base, with hidden_size 64"),
        ("llama_qformerv2", {"n_layers": 3}, "of 2 layers and the base has 3"),
        ("llama_qformerv2", {"vocab_size": 32000}, "vocabulary of 32000, .* have 40"),
        ("llama_adapter", {"n_heads": 8}, "prefix_gate is of 4 heads and the base has 8"),
    ],
)
def test_another_base_is_refused_with_both_numbers(kind, params, words):
    with pytest.raises(ValueError, match=words):
        config_from(PARAMS | params, accessory_state(kind), **OPTIONS)


def test_connector_of_another_width_is_refused():
    state = accessory_state("llama_qformerv2")
    config = config_from(PARAMS, state)
    with pytest.raises(ValueError, match=r"qformer_proj.0.weight has shape \(48, 24\), and \(32, 24\) is expected"):
        weights_from(state | {"llma.qformer_proj.0.weight": torch.zeros(48, 24)}, config)
    adapter = accessory_state("llama_adapter") | {"llma.prefix": torch.zeros(1, 1, 4, 32)}
    with pytest.raises(ValueError, match="visual_query has 3 rows and prefix has 4 prompts a layer"):
        config_from(PARAMS, adapter, **OPTIONS)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llama_qformerv2", {"extra": torch.zeros(1)}, r"\['extra'\] .*not known"),
        ("llama_qformerv2", {"end_img": None}, r"\['end_img'\] .*missing"),
        ("llama_qformerv2", {"qformer_proj.1.bias": None}, r"\['qformer_proj\.1\.bias'\] .*missing"),
        ("llama_qformerv2", {"layers.1.feed_forward.w2.weight": None}, r"missing.*layers\.1\.feed_forward\.w2"),
        ("llama_qformerv2", {"layers.0.feed_forward.experts.0.w1.weight": torch.zeros(1)}, r"not of Meta's.*experts"),
        ("llama_adapter", {"start_img": torch.zeros(1, 1, 32)}, r"\['start_img'\] .*not known"),
        ("llama_adapter", {"prefix_gate": None}, r"\['prefix_gate'\] .*missing"),
        ("llama_adapter", {"visual_proj.bias": None}, r"missing \['visual_proj\.bias'\]"),
        ("llama_adapter", {"prefix_new_gate": None}, r"adaption_new_gate.*missing"),
    ],
)
def test_every_key_is_accounted_for(kind, change, words):
    state = accessory_state(kind)
    config = config_from(PARAMS, state, **(OPTIONS if kind == "llama_adapter" else {}))
    changed = state | {f"llma.{name}": w for name, w in change.items()}
    with pytest.raises(ValueError, match=words):
        weights_from({name: w for name, w in changed.items() if w is not None}, config)


def test_it_is_told_from_the_other_systems():
    assert accessory.claims({"model": accessory_state("llama_adapter")})
    assert not accessory.claims(adapter_release("BIAS"))
