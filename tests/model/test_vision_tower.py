"""Towers compute what stock transformers computes, and no more."""

import copy

import pytest
import torch
from conftest import draw_picture
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from llava_lite.mm_utils import load_image_processor, prepare_picture
from llava_lite.model.vision_tower.base import count_read_layers
from llava_lite.picture_steps import read_steps
from llava_lite.pictures import picture_bytes


def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_equal_stock_hidden_states(kind, layer, toy_model, toy_tower_dir):
    stock_class = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": AutoModel}[kind]
    stock = stock_class.from_pretrained(toy_tower_dir(kind)).eval()
    tower = toy_model(tower=kind, mm_vision_select_layer=layer).get_vision_tower()
    with torch.no_grad():
        expected = stock(pictures(), output_hidden_states=True).hidden_states[layer]
        expected = expected if kind == "siglip" else expected[:, 1:]
        assert torch.allclose(tower(pictures()), expected, atol=1e-5)
    assert tower.num_patches == expected.shape[1] == 16


def test_cls_patch_keeps_the_class_token(toy_model):
    model = toy_model(mm_vision_select_feature="cls_patch")
    assert model.get_vision_tower()(pictures()).shape == (2, 17, 32)
    assert model.config.num_image_tokens == 17


def test_siglips_first_patch_is_dropped_where_a_checkpoint_was_trained_so(toy_model):
    whole = toy_model(tower="siglip").get_vision_tower()(pictures())
    model = toy_model(tower="siglip", mm_vision_select_feature="drop_first")
    assert torch.equal(model.get_vision_tower()(pictures()), whole[:, 1:])
    assert model.config.num_image_tokens == 15


def test_layers_after_the_one_that_is_read_never_run(toy_model):
    tower = toy_model().get_vision_tower()
    ran = []
    for index, layer in enumerate(tower.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    tower(pictures())
    assert ran == [0, 1]


def test_a_frozen_tower_keeps_no_graph_and_an_unfrozen_one_does(toy_model):
    tower = toy_model().get_vision_tower()
    assert tower(pictures()).requires_grad
    tower.requires_grad_(False)
    assert not tower(pictures()).requires_grad


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_bytes_are_normalised_as_the_image_processor_does(kind, toy_model, toy_tower_dir):
    tower = toy_model(tower=kind).get_vision_tower()
    processor = load_image_processor(toy_tower_dir(kind))
    pictures = [draw_picture(seed) for seed in range(3)]
    pixels = torch.stack([prepare_picture(picture, processor, "pad") for picture in pictures])
    by_bytes = torch.stack([picture_bytes(picture, read_steps(processor), "pad") for picture in pictures])
    assert by_bytes.dtype == torch.uint8
    assert torch.equal(tower.pixels(by_bytes), pixels)
    assert torch.equal(tower(by_bytes), tower(pixels))
    assert torch.equal(torch.cat(tower(list(by_bytes))), torch.cat(tower(list(pixels))))
    assert not [name for name in tower.state_dict() if "mean" in name or "constants" in name]
    tower = copy.deepcopy(tower).to(torch.bfloat16)
    assert torch.equal(tower.pixels(by_bytes), pixels.to(torch.bfloat16))


def test_bytes_and_crops_of_bytes_go_through_the_whole_model(toy_model, toy_tower_dir):
    model, processor = toy_model(), load_image_processor(toy_tower_dir("clip"))
    ids = torch.tensor([[1, -200, 5, 6]])
    crops = picture_bytes(draw_picture(0), read_steps(processor), "anyres", [[32, 64], [64, 32]])
    for images in (crops[:1], [crops]):
        number = lambda images: read_steps(processor).normalise(images)  # noqa: E731
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
        ValueError, match=r"unknown vision tower of model_type 'vit'.*known: clip_vision_model, dinov2, siglip"
    ):
        assemble(str(toy_llm_dir()), str(tmp_path))
