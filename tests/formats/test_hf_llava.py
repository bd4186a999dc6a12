"""transformers' own LLaVA: its names into ours and back, measured against transformers itself."""

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_lite.formats import foreign_format
from llava_lite.formats import hf_llava as layout
from llava_lite.model import model_class_for

IMAGE_ID = 60
TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def hf_model(text="llama", tower="clip", **fields):
    """Return a seeded LlavaForConditionalGeneration in eval mode: 16 patches, 64 tokens, layers that change much."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vision = TOWERS[tower](**shape, image_size=32, patch_size=8)
    words = TEXTS[text](**shape, vocab_size=64, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    if tower == "siglip":
        fields.setdefault("vision_feature_select_strategy", "full")
    words.tie_word_embeddings = fields.pop("tied", False)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=words, image_token_index=IMAGE_ID, **fields)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model.eval()


def get_weights(model, form):
    """Return the weights as one of three generations of files names them."""
    state = dict(model.state_dict())
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    if form == "module":
        return state
    tower = "vision_tower.vision_model." if form == "released" else "vision_tower."
    prefixes = {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": tower,
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
    }
    return {
        next(new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)): tensor
        for name, tensor in state.items()
    }


def ours_from(hf, form="released"):
    config = hf.config.to_dict()
    fields = layout.config_from(config)
    model_class = model_class_for(fields["model_type"])
    ours = model_class(model_class.config_class.from_dict(fields)).eval()
    state = layout.weights_from(get_weights(hf, form), config)
    result = ours.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if ours.config.tie_word_embeddings else set())
    ours.tie_weights()
    return ours


def asked():
    """Return ids [2, L] with the 16 features of an image in the first sequence, pixels and a mask."""
    torch.manual_seed(1)
    row = [1, 5, *[IMAGE_ID] * 16, 7, 9, 11]
    return {
        "input_ids": torch.tensor([row, [1, *range(3, 3 + len(row) - 1)]]),
        "attention_mask": torch.ones(2, len(row), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


@pytest.mark.parametrize("form", ["released", "module", "saved"])
@pytest.mark.parametrize(
    ("text", "tower", "fields"),
    [
        ("llama", "clip", {}),
        ("mistral", "siglip", {}),
        ("qwen2", "clip", {"tied": True}),
        ("llama", "clip", {"vision_feature_layer": -1}),
        ("llama", "clip", {"vision_feature_layer": [1]}),
        ("llama", "clip", {"projector_hidden_act": "linear"}),
        ("llama", "clip", {"multimodal_projector_bias": False}),
    ],
)
def test_model_of_transformers_answers_the_same_under_our_names(form, text, tower, fields):
    hf = hf_model(text, tower, **fields)
    ours = ours_from(hf, form)
    with torch.no_grad():
        expected, found = hf(**asked()).logits, ours(**asked()).logits
    # Two linear layers without an activation become one matmul; all else is the same sums.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["released", "module", "saved"])
@pytest.mark.parametrize("size", [(50, 40), (33, 90), (20, 20)], ids=str)
def test_llava_next_answers_the_same_under_our_names(form, size):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    hf = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=8),
            text_config=LlamaConfig(**shape, vocab_size=64, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_ID,
            # Rows first: tall grids and wide ones must not be taken for one another.
            image_grid_pinpoints=[[64, 32], [64, 64], [96, 32]],
        )
    ).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = ours_from(hf, form)
    layout_of_images = ours.config.image_layout
    assert layout_of_images.pinpoints == ((32, 64), (64, 64), (32, 96))
    pixels = torch.randn(1, layout_of_images.num_crops(size), 3, 32, 32)
    ids = torch.tensor([[1, 5, *[IMAGE_ID] * layout_of_images.num_tokens(size), 7, 9]])
    with torch.no_grad():
        # transformers counts the features itself and refuses another number.
        expected = hf(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([size[::-1]])).logits
        found = ours(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([size])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_all_tokens_of_the_tower_are_read_where_the_config_says_full():
    hf = hf_model(vision_feature_select_strategy="full")
    ours = ours_from(hf)
    assert ours.config.mm_vision_select_feature == "cls_patch"
    inputs = asked()
    # The class token makes 17 features.
    inputs["input_ids"][0, 18] = IMAGE_ID
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, hf(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_way_back_gives_the_released_names_and_the_very_tensors(tower):
    hf = hf_model(tower=tower)
    state = get_weights(hf, "released")
    config = hf.config.to_dict()
    fields = layout.config_from(config)
    ours = layout.weights_from(state, config)
    assert all(ours[name] is not None and name.startswith(("model.", "lm_head.")) for name in ours)
    back = layout.weights_to(ours, fields)
    assert back.keys() == state.keys()
    assert all(back[name].data_ptr() == state[name].data_ptr() for name in state)
    again = layout.config_to(fields, IMAGE_ID)
    opened = LlavaConfig.from_dict(again)
    assert opened.image_token_index == IMAGE_ID
    for part in ("text_config", "vision_config"):
        expected, found = getattr(hf.config, part).to_dict(), getattr(opened, part).to_dict()
        ignored = {"architectures", "dtype", "_name_or_path", "transformers_version", "rope_theta"}
        assert {k: v for k, v in found.items() if k not in ignored} == {
            k: v for k, v in expected.items() if k not in ignored
        }
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        assert getattr(opened, key) == getattr(hf.config, key)


def test_model_whose_experts_are_switched_off_is_a_dense_one():
    fields = layout.config_from(hf_model().config.to_dict()) | {"moe": {"moe_enable": False}}
    assert layout.refusal(fields) is None


def test_older_readers_find_rope_theta_and_architectures_in_the_text_config():
    fields = layout.config_from(hf_model("qwen2").config.to_dict())
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    text = layout.config_to(fields, IMAGE_ID)["text_config"]
    assert (text["rope_theta"], text["architectures"]) == (1e6, ["Qwen2ForCausalLM"])
    assert AutoConfig.for_model("qwen2", **{k: v for k, v in text.items() if k != "model_type"}).rope_parameters[
        "rope_theta"
    ] == pytest.approx(1e6)


def test_rope_scaling_is_read_under_its_old_keys_too_and_once():
    fields = layout.config_from(hf_model().config.to_dict())
    fields["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    written = layout.config_to(fields, IMAGE_ID)
    assert written["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert LlavaConfig.from_dict(written).text_config.rope_parameters == fields["rope_parameters"]
    ours = model_class_for("llama").config_class.from_dict(layout.config_from(written))
    assert ours.rope_parameters == fields["rope_parameters"]


def test_first_configs_of_llava_hf_say_little_and_mean_clip_l():
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "vocab_size": 32064, "torch_dtype": "float16"},
        "torch_dtype": "float16",
    }
    assert foreign_format(config) is layout
    fields = layout.config_from(config)
    assert fields["model_type"] == "llava_llama"
    assert (fields["vision_config"]["hidden_size"], fields["vision_config"]["image_size"]) == (1024, 336)
    assert (fields["image_token_index"], fields["vocab_size"], fields["dtype"]) == (32000, 32064, "float16")
    made = model_class_for("llama").config_class.from_dict(fields)
    assert made.num_image_tokens == 576


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"},
        {"model_type": "llava_llama"},
        {"model_type": "llama"},
        {},
    ],
)
def test_other_checkpoints_are_not_claimed(config):
    assert not layout.claims(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vision_feature_layer": [-2, -5]}, "joins the features of 2 layers"),
        ({"projector_hidden_act": "quick_gelu"}, "projector_hidden_act 'quick_gelu' has no connector"),
    ],
)
def test_what_we_cannot_do_is_refused_on_the_way_in(fields, words):
    with pytest.raises(ValueError, match=words):
        layout.config_from(hf_model(**fields).config.to_dict())


def test_the_default_strategy_drops_the_first_patch_of_a_tower_without_a_class_token():
    hf = hf_model(tower="siglip", vision_feature_select_strategy="default").config
    ours = layout.config_from(hf.to_dict())
    assert ours["mm_vision_select_feature"] == "drop_first"
    assert layout.strategy(ours) == "default"
    assert layout.num_features(ours) == (hf.vision_config.image_size // hf.vision_config.patch_size) ** 2 - 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moe": {"num_experts": [4]}}, "for Qwen3 alone"),
        ({"model_type": "llava_phi"}, "lm_head has a bias"),
        ({"model_type": "llava_gemma"}, "not among those tried"),
        ({"vision_config": None}, "no vision tower"),
        ({"vision_config": {"model_type": "dinov2"}}, "'dinov2' is none that readers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "'mlp3x_gelu' is not two linear layers"),
        ({"mm_image_size": 24}, "fed 24 pixels and built for 32"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "spatial_unpad"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "has no image_newline"),
    ],
)
def test_what_the_layout_cannot_express_is_refused_and_stays_loadable(fields, words):
    config = layout.config_from(hf_model().config.to_dict()) | fields
    with pytest.raises(ValueError, match=rf"{words}.*stays loadable here"):
        layout.config_to(config, IMAGE_ID)
