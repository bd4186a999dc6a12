"""Checkpoints of the adapter systems open as models: their formula, written out in Meta's names, gives the logits."""

import json

import pytest
import torch
from conftest import draw_image
from torch.nn import functional as F
from toy_originals import (
    ADAPTER_PARAMS,
    PARAMS,
    VOCAB,
    accessory_state,
    adapter_full,
    adapter_release,
    meta_state,
    write_clip,
)
from toy_originals import PROMPTS as NUM_PROMPTS
from transformers import Blip2Config, LlamaForCausalLM

from llava_lite.formats import llama_adapter, meta_llama
from llava_lite.model.assemble import model_from_weights
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.encoders.blip2 import Blip2Encoder
from llava_lite.model.originals import open_original, read_original

KINDS = ("BIAS", "LORA-BIAS", "CAPTION")
HEADS = {"mm_query_heads": 2, "vision_config": {"num_attention_heads": 4}}


def rotate(x):  # [B, T, H, d], pairs of neighbours
    angles = torch.outer(torch.arange(x.shape[1]).float(), 10000.0 ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    )
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
def meta_forward(state, params, ids, visual=None, num_adapted=0):
    """Return the logits [B, T, V] of LLaMA-Adapter V2's decoder: biases, LoRA and gated prompts as the paper has them.

    state: Meta's names, without a prefix; the table of prompts is adapter_query.weight.
    """
    heads, num_layers = params["n_heads"], params["n_layers"]

    def linear(x, place, block, with_lora=True):
        out = x @ state[f"{block}.{place}.weight"].T + state.get(f"{block}.{place}.bias", 0)
        halves = [state.get(f"{block}.lora_{place}_l{i}.weight") for i in (1, 2)]
        return out if halves[0] is None or not with_lora else out + x @ halves[0].T @ halves[1].T

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * state[name]

    hidden = state["tok_embeddings.weight"][ids]
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    for i in range(num_layers):
        block = f"layers.{i}.attention"
        x = norm(hidden, f"layers.{i}.attention_norm.weight")
        q, k, v = (linear(x, name, block).unflatten(-1, (heads, -1)) for name in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        mixed = (q @ k.transpose(2, 3) * scale + mask).softmax(-1) @ v
        row = i - (num_layers - num_adapted)
        if row >= 0:
            table = state["adapter_query.weight"].view(num_adapted, NUM_PROMPTS, -1)[row]
            prompts = table + (0 if visual is None else visual)
            prompts = prompts.expand(len(ids), -1, -1)
            pk, pv = (linear(prompts, name, block, False).unflatten(-1, (heads, -1)).transpose(1, 2)
                      for name in ("wk", "wv"))  # fmt: skip
            gate = state[f"{block}.gate"].tanh() * state.get(f"{block}.new_gate", 1.0)
            mixed = mixed + gate * ((q @ pk.transpose(2, 3) * scale).softmax(-1) @ pv)
        hidden = hidden + linear(mixed.transpose(1, 2).flatten(2), "wo", block)
        x, block = norm(hidden, f"layers.{i}.ffn_norm.weight"), f"layers.{i}.feed_forward"
        hidden = hidden + linear(F.silu(linear(x, "w1", block)) * linear(x, "w3", block), "w2", block)
    return norm(hidden, "norm.weight") @ state["output.weight"].T


def write_meta(directory, params, **kwargs):
    directory.mkdir()
    state = meta_state(params, **kwargs)
    torch.save(state, directory / "consolidated.00.pth")
    (directory / "params.json").write_text(json.dumps(params))
    return state


@pytest.fixture
def tokens():
    return torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


def test_metas_own_directory_opens_as_the_model_that_it_is(tmp_path, tokens):
    params = PARAMS | {"n_kv_heads": 2}
    write_meta(tmp_path / "7B", params)
    model = open_original(tmp_path / "7B")
    fields = meta_llama.config_from_params(params, VOCAB)
    from transformers import LlamaConfig

    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"})).eval()
    plain.load_state_dict(meta_llama.weights_from(meta_state(params), 4, 2))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, plain(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_on_metas_base_gives_the_logits_of_the_formula(tmp_path, tokens, kind):
    base = write_meta(tmp_path / "7B", ADAPTER_PARAMS)
    release = adapter_release(kind)
    torch.save({"model": release}, tmp_path / f"{kind}.pth")
    tower = str(write_clip(tmp_path / "clip"))
    model = open_original(tmp_path / f"{kind}.pth", tmp_path / "7B", tower, mm_query_heads=2, mm_text_only="bare")
    state = base | {name.removeprefix("llama."): weight for name, weight in release.items()}
    with torch.no_grad():
        visual = torch.randn(2, NUM_PROMPTS, 32)
        for given in (None, visual):
            found = model(tokens, visual_prompts=given).logits
            assert torch.allclose(found, meta_forward(state, ADAPTER_PARAMS, tokens, given, 2), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_training_holds_all_of_it(tmp_path, tokens, kind):
    full = adapter_full(kind)
    torch.save({"model": full}, tmp_path / "checkpoint-1.pth")
    (tmp_path / "params.json").write_text(json.dumps(ADAPTER_PARAMS))
    model = open_original(tmp_path / "checkpoint-1.pth", **HEADS)
    assert model.config.image_channels == "bgr"
    assert model.get_vision_tower().projects
    state = {name.removeprefix("llma."): weight for name, weight in full.items()}
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        visual = model.encode_images(images)
        expected = meta_forward(state, ADAPTER_PARAMS, tokens, visual, 2)
        assert torch.allclose(model(tokens, images=images).logits, expected, atol=2e-4, rtol=1e-4)


def test_a_release_stands_on_a_base_in_hugging_faces_layout(tmp_path, tokens, toy_tokenizer):
    base = write_meta(tmp_path / "7B", ADAPTER_PARAMS)
    model = open_original(tmp_path / "7B")
    from transformers import LlamaConfig

    fields = meta_llama.config_from_params(ADAPTER_PARAMS, VOCAB)
    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    plain.save_pretrained(tmp_path / "hf")
    toy_tokenizer.save_pretrained(tmp_path / "hf")
    release = adapter_release("LORA-BIAS")
    torch.save({"model": release}, tmp_path / "LORA-BIAS.pth")
    tower = str(write_clip(tmp_path / "clip"))
    _, opened, image_processor, _ = load_pretrained_model(
        str(tmp_path / "LORA-BIAS.pth"), str(tmp_path / "hf"), device="cpu", mm_query_heads=2, vision_tower=tower
    )
    assert image_processor.crop_size["height"] == 12
    state = base | {name.removeprefix("llama."): weight for name, weight in release.items()}
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = meta_forward(state, ADAPTER_PARAMS, tokens, opened.encode_images(images), 2)
        assert torch.allclose(opened(tokens, images=images).logits, expected, atol=2e-4, rtol=1e-4)
        # Text alone: as trained, with a blank image.
        blank = opened.encode_images(torch.zeros(1, 3, 12, 12))
        expected = meta_forward(state, ADAPTER_PARAMS, tokens, blank, 2)
        assert torch.allclose(opened(tokens).logits, expected, atol=2e-4, rtol=1e-4)


def test_accessorys_adapter_passes_prompts_through_lora(tmp_path, tokens):
    state = accessory_state("llama_adapter", PARAMS)
    (tmp_path / "acc").mkdir()
    torch.save({"model": state}, tmp_path / "acc" / "consolidated.00-of-01.model.pth")
    (tmp_path / "acc" / "params.json").write_text(json.dumps(PARAMS))
    model = open_original(tmp_path / "acc", **HEADS)
    assert model.config.adaption_prompt_lora
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    images = torch.randn(2, 3, 12, 12)
    assert model(tokens, images=images).logits.shape == (2, 6, VOCAB)


def test_accessorys_qformer_model_opens_with_the_encoder_that_it_holds(tmp_path, tokens):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {
        "model_type": "blip-2",
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14, **layers},
        "qformer_config": {"hidden_size": 24, "intermediate_size": 32, **layers},
        "num_query_tokens": 4,
    }
    torch.manual_seed(0)
    encoder = Blip2Encoder(Blip2Config(**{key: value for key, value in sizes.items() if key != "model_type"})).eval()
    state = {name: weight for name, weight in accessory_state("llama_qformerv2").items() if ".qformer." not in name}
    state |= {f"llma.qformer.{name}": weight for name, weight in encoder.state_dict().items()}
    (tmp_path / "acc").mkdir()
    torch.save({"model": state}, tmp_path / "acc" / "consolidated.00-of-01.model.pth")
    (tmp_path / "acc" / "params.json").write_text(json.dumps(PARAMS))
    model = open_original(tmp_path / "acc", vision_config=sizes)
    images = torch.randn(2, 3, 28, 28)
    ids = torch.cat([tokens[:, :1], torch.full((2, 1), -200), tokens[:, 1:]], dim=1)
    plain = {name.removeprefix("llma."): weight for name, weight in state.items()}
    with torch.no_grad():
        # The decoder of Meta's formula has no image: its embeddings are given in place of the words'.
        features = encoder(images) @ plain["qformer_proj.0.weight"].T + plain["qformer_proj.0.bias"]
        features = F.layer_norm(features, (32,), plain["qformer_proj.1.weight"], plain["qformer_proj.1.bias"])
        ends = [plain[name].expand(2, 1, 32) for name in ("start_img", "end_img")]
        words = plain["tok_embeddings.weight"][tokens]
        embeds = torch.cat([words[:, :1], ends[0], features, ends[1], words[:, 1:]], dim=1)
        rows = plain | {"tok_embeddings.weight": embeds.flatten(0, 1)}
        expected = meta_forward(rows, PARAMS, torch.arange(embeds.shape[1] * 2).view(2, -1))
        assert torch.allclose(model(ids, images=images).logits, expected, atol=2e-4, rtol=1e-4)


def test_the_image_channels_of_a_release_are_swapped(tmp_path, toy_tower_dir):
    from llava_lite.media.preprocess import in_channels, load_image_processor, prepare_image, process_images

    image, processor = draw_image(0), load_image_processor(toy_tower_dir("clip"))
    config = type("Config", (), {"image_aspect_ratio": "square", "image_channels": "bgr"})
    assert torch.equal(process_images([image], processor, config)[0],
                       prepare_image(in_channels(image, "bgr"), processor))  # fmt: skip
    red, green, blue = image.convert("RGB").getpixel((3, 4))
    assert in_channels(image, "bgr").getpixel((3, 4)) == (blue, green, red)


def test_a_wrong_or_missing_base_is_refused_with_both_numbers(tmp_path, toy_llm_dir):
    torch.save({"model": adapter_release("BIAS")}, tmp_path / "BIAS.pth")
    with pytest.raises(ValueError, match=r"has no params.json beside it, .* Give its base"):
        read_original(tmp_path / "BIAS.pth", mm_query_heads=2)
    with pytest.raises(ValueError, match=r"is for 2 layers|are of 3 layers and the base has 4|expects"):
        read_original(tmp_path / "BIAS.pth", str(toy_llm_dir("llama")), mm_query_heads=2)
    with pytest.raises(ValueError, match=r"the base .* is a phi; LLaMA-Adapter"):
        read_original(tmp_path / "BIAS.pth", str(toy_llm_dir("phi")), mm_query_heads=2)
    (tmp_path / "params.json").write_text(json.dumps(ADAPTER_PARAMS))
    with pytest.raises(ValueError, match="holds only what was trained"):
        open_original(tmp_path / "BIAS.pth", mm_query_heads=2)
    write_meta(tmp_path / "7B", ADAPTER_PARAMS)
    with pytest.raises(ValueError, match="a connector for features of width 20 and no vision tower"):
        open_original(tmp_path / "BIAS.pth", tmp_path / "7B", mm_query_heads=2)


def test_every_weight_is_accounted_for(tokens):
    full = adapter_full("BIAS")
    fields = llama_adapter.config_from(ADAPTER_PARAMS, full, **HEADS)
    weights = llama_adapter.weights_from(full, fields)
    model = model_from_weights(fields, weights)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), name
    short = {name: weight for name, weight in weights.items() if "adaption_prompt" not in name}
    with pytest.raises(ValueError, match="1 missing, such as"):
        model_from_weights(fields, short)
    with pytest.raises(ValueError, match="1 unexpected, such as"):
        model_from_weights(fields, weights | {"model.other": torch.zeros(1)})
