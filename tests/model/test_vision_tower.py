"""Towers compute what stock transformers computes, and no more."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from llava_lite.model.vision_tower.base import count_read_layers


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
