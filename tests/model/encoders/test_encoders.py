"""Towers compute what transformers computes, and no more."""

import copy

import pytest
import torch
from conftest import draw_image
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from llava_lite.media.preprocess import image_bytes, load_image_processor, prepare_image
from llava_lite.media.transform import read_transform
from llava_lite.model.assemble import assemble
from llava_lite.model.encoders.base import count_read_layers


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_equal_hidden_states_of_transformers(kind, layer, toy_model, toy_tower_dir):
    hf_class = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": AutoModel}[kind]
    hf = hf_class.from_pretrained(toy_tower_dir(kind)).eval()
    tower = toy_model(tower=kind, mm_vision_select_layer=layer).get_vision_tower()
    with torch.no_grad():
        expected = hf(images(), output_hidden_states=True).hidden_states[layer]
        expected = expected if kind == "siglip" else expected[:, 1:]
        assert torch.allclose(tower(images()), expected, atol=1e-5)
    assert tower.num_patches == expected.shape[1] == 16


def test_cls_patch_keeps_the_class_token(toy_model):
    model = toy_model(mm_vision_select_feature="cls_patch")
    assert model.get_vision_tower()(images()).shape == (2, 17, 32)
    assert model.config.num_image_tokens == 17


def test_siglips_first_patch_is_dropped_where_a_checkpoint_was_trained_so(toy_model):
    full = toy_model(tower="siglip").get_vision_tower()(images())
    model = toy_model(tower="siglip", mm_vision_select_feature="drop_first")
    assert torch.equal(model.get_vision_tower()(images()), full[:, 1:])
    assert model.config.num_image_tokens == 15


def test_layers_after_the_one_that_is_read_never_run(toy_model):
    tower = toy_model().get_vision_tower()
    ran = []
    for index, layer in enumerate(tower.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    tower(images())
    assert ran == [0, 1]


def test_a_frozen_tower_keeps_no_graph_and_an_unfrozen_one_does(toy_model):
    tower = toy_model().get_vision_tower()
    assert tower(images()).requires_grad
    tower.requires_grad_(False)
    assert not tower(images()).requires_grad


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_bytes_are_normalised_as_the_image_processor_does(kind, toy_model, toy_tower_dir):
    tower = toy_model(tower=kind).get_vision_tower()
    processor = load_image_processor(toy_tower_dir(kind))
    images = [draw_image(seed) for seed in range(3)]
    pixels = torch.stack([prepare_image(image, processor, "pad") for image in images])
    by_bytes = torch.stack([image_bytes(image, read_transform(processor), "pad") for image in images])
    assert by_bytes.dtype == torch.uint8
    assert torch.equal(tower.pixels(by_bytes), pixels)
    assert torch.equal(tower(by_bytes), tower(pixels))
    assert torch.equal(torch.cat(tower(list(by_bytes))), torch.cat(tower(list(pixels))))
    assert not [name for name in tower.state_dict() if "mean" in name or "constants" in name]
    tower = copy.deepcopy(tower).to(torch.bfloat16)
    assert torch.equal(tower.pixels(by_bytes), pixels.to(torch.bfloat16))


def test_bytes_and_crops_of_bytes_go_through_the_full_model(toy_model, toy_tower_dir):
    model, processor = toy_model(), load_image_processor(toy_tower_dir("clip"))
    ids = torch.tensor([[1, -200, 5, 6]])
    crops = image_bytes(draw_image(0), read_transform(processor), "anyres", [[32, 64], [64, 32]])
    for images in (crops[:1], [crops]):
        number = lambda images: read_transform(processor).normalise(images)  # noqa: E731
        numbers = [number(images[0])] if isinstance(images, list) else number(images)
        assert torch.equal(model(ids, images=images).logits, model(ids, images=numbers).logits)
    features = model.get_image_features(crops).last_hidden_state
    assert torch.equal(features, model.get_image_features(number(crops)).last_hidden_state)


def test_bytes_for_a_processor_that_does_more_are_refused(toy_model):
    tower = toy_model().get_vision_tower()
    tower.image_processor.do_normalize = False
    with pytest.raises(ValueError, match="do_normalize is off"):
        tower(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_layer_counts_by_hand():
    assert count_read_layers(-2, 24) == 23
    assert count_read_layers(-1, 24) == 24
    assert count_read_layers(0, 24) == 0
    with pytest.raises(ValueError, match="mm_vision_select_layer -30 does not exist in a tower of 24 layers"):
        count_read_layers(-30, 24)


def test_an_unknown_tower_is_refused_with_the_known_ones(tmp_path, toy_llm_dir):
    from transformers import ViTConfig, ViTModel

    from llava_lite.model.assemble import assemble

    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"unknown vision tower of model_type 'vit'.*known: blip-2, clip_vision_model, dinov2"
    ):
        assemble(str(toy_llm_dir()), str(tmp_path))


PROJECTING = {"mm_vision_projection": True, "mm_vision_select_layer": -1}


@torch.no_grad()
@pytest.mark.parametrize("feature", ["cls_patch", "patch", "pooled"])
def test_clip_with_its_projection_is_transformers_own(toy_llm_dir, toy_tower_dir, feature, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    own = CLIPVisionModelWithProjection.from_pretrained(toy_tower_dir("clip"), projection_dim=12).eval()
    own.save_pretrained(tmp_path)
    model = assemble(
        toy_llm_dir(), str(tmp_path), config_overrides={"mm_vision_select_feature": feature, **PROJECTING}
    )
    tower = model.get_vision_tower()
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    inner = own.vision_model
    tokens = own.visual_projection(inner.post_layernorm(inner(images).last_hidden_state))
    expected = {"cls_patch": tokens, "patch": tokens[:, 1:], "pooled": own(images).image_embeds[:, None]}[feature]
    assert torch.allclose(tower(images), expected, atol=1e-5)
    assert model.config.mm_hidden_size == tower.hidden_size == own.config.projection_dim
    assert model.config.num_image_tokens == expected.shape[1]
    assert not {n for n, p in tower.named_parameters() if p in tower.unread()} & {
        "vision_tower.visual_projection.weight"
    }


@torch.no_grad()
def test_pooled_features_are_those_of_the_towers_own_pooling(toy_model, toy_tower_dir):
    from transformers import AutoModel

    for kind in ("clip", "siglip", "dinov2"):
        model = toy_model("llama", tower=kind, mm_vision_select_feature="pooled", mm_vision_select_layer=-1)
        tower = model.get_vision_tower()
        own = AutoModel.from_pretrained(toy_tower_dir(kind)).eval()
        own = getattr(own, "vision_model", own)
        images = torch.randn(2, 3, tower.image_size, tower.image_size)
        assert torch.allclose(tower(images)[:, 0], own(images).pooler_output, atol=1e-5), kind
        assert model.config.num_image_tokens == 1


def test_a_projection_is_clips_alone_and_must_be_in_its_checkpoint(toy_model):
    with pytest.raises(ValueError, match=r"is not the CLIPVisionModelWithProjection .* weights are missing"):
        toy_model("llama", **PROJECTING)
    with pytest.raises(ValueError, match="mm_vision_projection is CLIP's, and the tower is of model_type 'dinov2'"):
        toy_model("llama", tower="dinov2", **PROJECTING)
