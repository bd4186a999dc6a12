"""Gated prompts in attention, against the formula written out."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from llava_lite.configuration import CONFIGS
from llava_lite.model import model_class_for

BACKBONES = list(CONFIGS)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 12,
}
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {
    "initializer_range": 0.2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = {"mm_injection": "adaption_prompt", "adaption_prompt_len": 5, "adaption_prompt_layers": 2}
PROMPTS |= {"mm_projector_type": "query_vit", "mm_query_len": 5, "mm_query_hidden": 16, "mm_query_depth": 1}
PROMPTS |= {"mm_query_heads": 2, "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
ONE = PROMPTS | {"adaption_prompt_len": 1, "adaption_prompt_layers": None, "mm_projector_type": "gated_mlp2x"}
ONE |= {"mm_vision_select_feature": "pooled", "mm_vision_projection": True}


def build(kind="llama", open_gates=True, **fields):
    """Return a seeded model in eval mode; its gates are opened unless they shall stay as they start."""
    torch.manual_seed(0)
    text = TEXT | ({"head_dim": 8} if kind == "qwen3" else {}) | ({"num_key_value_heads": 4} if kind == "phi" else {})
    config = CONFIGS[kind](**text, vision_config=dict(VISION), **(PROMPTS | fields))
    model = model_class_for(kind)(config).eval()
    if open_gates:
        for name, weight in model.named_parameters():
            if name.endswith("adaption_gate"):
                weight.data.normal_()
    return model


def inputs(batch=2, length=7):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, TEXT["vocab_size"], (batch, length), generator=generator)
    return ids, torch.randn(batch, 3, 16, 16, generator=generator)


def rotate(x, angles):
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


@torch.no_grad()
def llama_with_prompts(model, ids, visual):
    """Return the logits of a Llama whose last layers have prompts: every line of the formula, without transformers."""
    config, weights = model.config, dict(model.named_parameters())
    heads, groups, width = config.num_attention_heads, 2, config.hidden_size // config.num_attention_heads
    table = weights["model.adaption_prompt.query"].view(config.num_prompted_layers, config.adaption_prompt_len, -1)
    angles = torch.outer(torch.arange(ids.shape[1]).float(), 10000.0 ** -(torch.arange(0, width, 2) / width))
    angles = torch.cat([angles, angles], dim=-1)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def split(x):
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    hidden = weights["model.embed_tokens.weight"][ids]
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        x = norm(hidden, f"{at}input_layernorm.weight")
        linear = {n: partial(F.linear, weight=weights[f"{at}self_attn.{n}_proj.weight"]) for n in "qkv"}
        query, key, value = (split(linear[name](x)) for name in "qkv")
        query, key = rotate(query, angles), rotate(key, angles)
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        mixed = (query @ key.transpose(2, 3) / width**0.5 + mask).softmax(-1) @ value
        row = i - (config.num_hidden_layers - config.num_prompted_layers)
        if row >= 0:
            prompts = table[row] + visual  # [B, K, D]
            keys, values = (split(linear[name](prompts)).repeat_interleave(groups, 1) for name in "kv")
            scores = (query @ keys.transpose(2, 3) / width**0.5).softmax(-1)
            gate = weights[f"{at}self_attn.adaption_gate"].view(1, heads, 1, 1)
            mixed = mixed + gate.tanh() * (scores @ values)
        hidden = hidden + mixed.transpose(1, 2).flatten(2) @ weights[f"{at}self_attn.o_proj.weight"].T
        x = norm(hidden, f"{at}post_attention_layernorm.weight")
        gate, up, down = (weights[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        hidden = hidden + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("fields", [PROMPTS, ONE], ids=["ten prompts", "one prompt"])
def test_logits_are_those_of_the_formula(fields):
    model, (ids, images) = build(**fields), inputs()
    with torch.no_grad():
        visual = model.encode_images(images)
        assert visual.shape == (2, model.config.adaption_prompt_len, 32)
        expected = llama_with_prompts(model, ids, visual)
        assert torch.allclose(model(ids, images=images).logits, expected, atol=1e-5)
        bare = llama_with_prompts(model, ids, torch.zeros_like(visual))
        assert torch.allclose(model(ids).logits, bare, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_closed_gates_are_the_base_model_bit_for_bit(kind, attention):
    model, (ids, images) = build(kind, open_gates=False), inputs()
    text = {k: v for k, v in model.config.to_dict().items() if k in TEXT or k == "head_dim"}
    base = model_class_for(kind)(CONFIGS[kind](**text)).eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if k in base.state_dict()})
    for one in (model, base):
        one.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.equal(model(ids, images=images).logits, base(ids).logits)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "bare"])
@pytest.mark.parametrize("fields", [PROMPTS, ONE], ids=["ten prompts", "one prompt"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_cache_changes_nothing(kind, fields, with_image):
    model, (ids, images) = build(kind, **fields), inputs()
    given = {"images": images} if with_image else {}
    answer = model.generate(ids, images=given.get("images"), max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = ids
    with torch.no_grad():
        for _ in range(6):
            whole = torch.cat([whole, model(whole, **given).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, whole[:, ids.shape[1] :])


@pytest.mark.parametrize("kind", BACKBONES)
def test_samples_of_a_packed_row_are_exact(kind):
    model, (ids, images) = build(kind), inputs()
    row = torch.cat([ids[0], ids[1, :5]])[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        for rows in ([0, 1], [1], []):
            owned = images[rows]
            packed = model(row, position_ids=positions, images=owned, image_rows=torch.tensor(rows)).logits
            alone = [model(part, **({"images": images[[i]]} if i in rows else {})).logits
                     for i, part in enumerate((ids[:1], ids[1:, :5]))]  # fmt: skip
            assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


def test_padding_on_either_side_and_beams_and_samples_are_as_one_by_one():
    model, (ids, images) = build(), inputs()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    both = model.generate(padded, images=images, attention_mask=mask, **options)
    alone = [model.generate(ids[:1], images=images[:1], **options),
             model.generate(ids[1:, 3:], images=images[1:], **options)]  # fmt: skip
    assert torch.equal(both, torch.cat(alone))
    right, mask = torch.cat([ids[1:, 3:], torch.zeros(1, 3, dtype=torch.long)], 1), torch.tensor([[1] * 4 + [0] * 3])
    assert torch.equal(model.generate(right, images=images[1:], attention_mask=mask, **options), alone[1])


def test_transformers_convention_and_a_static_cache_give_the_same_tokens():
    model, (ids, images) = build(), inputs()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    new = model.generate(ids, images=images, **options)
    assert torch.equal(model.generate(ids, pixel_values=images, **options), torch.cat([ids, new], dim=1))
    assert torch.equal(model.generate(ids, images=images, cache_implementation="static", **options), new)
    drafted = model.generate(ids[:1], images=images[:1], prompt_lookup_num_tokens=2, **options)
    assert torch.equal(drafted, new[:1])


def gradients(model, ids, images, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, images=images, **kwargs).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_checkpointing_gives_the_same_gradients(kind):
    model, (ids, images) = build(kind).train(), inputs()
    plain = gradients(model, ids, images)
    model.gradient_checkpointing_enable()
    again = gradients(model, ids, images)
    assert plain.keys() == again.keys()
    assert {"model.adaption_prompt.query", "model.mm_projector.query"} <= plain.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_batch_of_text_reaches_every_weight_that_one_with_images_reaches():
    # DDP and ZeRO wait for the same weights on every rank.
    model, (ids, images) = build().train(), inputs()
    with_images, without = gradients(model, ids, images), gradients(model, ids, None)
    assert with_images.keys() == without.keys()
    assert not without["model.mm_projector.query"].any()
    assert without["model.adaption_prompt.query"].any()


def test_a_text_may_get_a_blank_image():
    model, (ids, images) = build(mm_text_only="blank"), inputs()
    blank = torch.zeros_like(images)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, model(ids, images=blank).logits, atol=1e-5)
        mixed = model(ids, images=images[:1], image_rows=torch.tensor([1])).logits
        expected = torch.cat([model(ids[:1], images=blank[:1]).logits, model(ids[1:], images=images[:1]).logits])
        assert torch.allclose(mixed, expected, atol=1e-5)


def test_cached_features_are_the_images():
    model, (ids, images) = build(**ONE), inputs()
    with torch.no_grad():
        features = torch.cat(model.tower_features(images))
        assert torch.equal(model(ids, image_features=features).logits, model(ids, images=images).logits)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_saved_model_opens_as_it_was(kind, tmp_path):
    model, (ids, images) = build(kind, adaption_prompt_new_gate=True), inputs()
    for layer in model.model.layers[1:]:
        layer.self_attn.adaption_new_gate.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert opened.config._attn_implementation == "adaption_prompt_eager"
    with torch.no_grad():
        assert torch.allclose(opened(ids, images=images).logits, model(ids, images=images).logits, atol=1e-5)


def test_lora_leaves_the_prompts_alone_unless_the_config_says_otherwise():
    from peft import LoraConfig, get_peft_model

    model = build()
    attention = model.model.layers[1].self_attn
    prompts = torch.randn(2, 5, 32)
    from llava_lite.model.adaption_prompt import project_prompts

    expected = project_prompts(attention, prompts)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    assert all(torch.equal(a, b) for a, b in zip(project_prompts(attention, prompts), expected, strict=True))
    tuned.config.adaption_prompt_lora = True
    assert not torch.equal(project_prompts(attention, prompts)[0], expected[0])


def test_what_does_not_fit_is_refused():
    model, (ids, images) = build(), inputs()
    with pytest.raises(ValueError, match="3 images for 2 sequences with mm_injection adaption_prompt: give one image"):
        model(ids, images=torch.cat([images, images[:1]]))
    with pytest.raises(ValueError, match=r"image_rows \[0, 0\] of 2 images for 2 sequences; .* has one image or none"):
        model(ids, images=images, image_rows=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="3 image placeholders in input_ids of a model with mm_injection"):
        model(ids.masked_fill(ids == ids[:, :1], -200), images=images)
    with pytest.raises(ValueError, match="attn_implementation 'flex_attention' with mm_injection adaption_prompt"):
        model.set_attn_implementation("flex_attention")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="the attention is 'sdpa', which would leave the prompts out"):
        model(ids, images=images)


def test_an_image_of_several_crops_is_refused_and_one_of_one_is_read():
    model, (ids, images) = build(), inputs()
    with torch.no_grad():
        expected = model(ids, images=images).logits
        for given in (list(images), images[:, None], [image[None] for image in images]):
            assert torch.equal(model(ids, images=given).logits, expected)
    for given in (torch.randn(2, 2, 3, 16, 16), [torch.randn(2, 3, 16, 16), images[0]]):
        with pytest.raises(
            ValueError, match="image 0 has 2 crops; with mm_injection adaption_prompt an image is read"
        ):
            model(ids, images=given)
        with pytest.raises(ValueError, match="image 0 has 2 crops"):
            model.generate(ids, images=given, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"image_rows \[-1, 0\] of 2 images"):
        model(ids, images=images, image_rows=torch.tensor([-1, 0]))


def test_ways_that_would_lose_an_image_or_a_prompt_are_refused():
    model, (ids, images) = build(), inputs()
    with pytest.raises(ValueError, match="images are in no embeddings; give them to forward or generate"):
        model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
    for option in ({"assistant_model": copy.deepcopy(model)}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="a draft model is given no prompts of mm_injection adaption_prompt"):
            model.generate(ids[:1], images=images[:1], max_new_tokens=2, **option)
    assert model.config.num_hidden_layers == 3


def test_a_mask_of_the_sequences_with_an_image_is_their_numbers():
    model, (ids, images) = build(), inputs()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    for rows, mask in (([1], [False, True]), ([0, 1], [True, True]), ([], [False, False])):
        numbered = {"images": images[rows], "image_rows": torch.tensor(rows, dtype=torch.long)}
        masked = {"images": images[rows], "image_rows": torch.tensor(mask)}
        with torch.no_grad():
            assert torch.equal(model(ids, **masked).logits, model(ids, **numbered).logits)
        assert torch.equal(model.generate(ids, **masked, **options), model.generate(ids, **numbered, **options))
    with pytest.raises(ValueError, match=r"image_rows \[0\] of 2 images for 2 sequences"):
        model(ids, images=images, image_rows=torch.tensor([True, False]))


def test_positions_that_count_as_usual_change_nothing():
    model, (ids, images) = build(), inputs()
    mask, options = torch.ones_like(ids), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    mask[0, 5:] = 0
    expected = model.generate(ids, images=images, attention_mask=mask, **options)
    positions = torch.arange(7)[None].expand(2, -1)
    assert torch.equal(
        model.generate(ids, images=images, attention_mask=mask, position_ids=positions, **options), expected
    )
    with pytest.raises(ValueError, match="position_ids that do not count"):
        model.generate(ids, images=images, attention_mask=mask, position_ids=positions + 3, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_query_len": 4}, "4 vectors of an image and adaption_prompt_len 5"),
        ({"adaption_prompt_layers": 4}, "adaption_prompt_layers 4 of a model of 3 layers; give 1 to 3"),
        ({"mm_boundary_vectors": True}, "belong to mm_injection tokens"),
        ({"image_aspect_ratio": "anyres"}, "reads an image as a whole"),
        ({"mm_injection": "prompt"}, "unknown mm_injection 'prompt'; known: tokens, adaption_prompt"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_calls_from_threads_do_not_see_each_others_prompts():
    from concurrent.futures import ThreadPoolExecutor

    model, (ids, images) = build("stablelm"), inputs()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(ids[i : i + 1], images=images[i : i + 1], **options) for i in range(2)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(model.generate, ids[i % 2 :][:1], images=images[i % 2 :][:1], **options) for i in range(8)]
    assert all(torch.equal(job.result(), alone[i % 2]) for i, job in enumerate(jobs))


def test_a_copy_keeps_its_prompts():
    model, (ids, images) = build("stablelm"), inputs()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids, images=images).logits, model(ids, images=images).logits)
