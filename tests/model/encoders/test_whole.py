"""Towers whose encoder makes the features itself, inside a model: BLIP-2's Q-Former and ImageBind."""

import pytest
import torch
from conftest import draw_image
from transformers import Blip2Config, Blip2Model
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from llava_lite.hub.source import VISION_TOWER, check_source
from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.inference import reply
from llava_lite.model.assemble import assemble
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.tower_config import load_vision_config

IN_FRONT = {"mm_projector_type": "linear_norm", "mm_boundary_vectors": True, "mm_image_position": "front"}
SIZES = {"hidden_size": 16, "image_size": 28, "vision_width": 16, "num_hidden_layers": 2, "vision_num_heads": 2}
SIZES |= {"audio_width": 16, "audio_num_layers": 1, "audio_num_heads": 2, "modalities": ["image", "audio"]}

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
BLIP2 = {
    "vision_config": {"hidden_size": 24, "intermediate_size": 48, "image_size": 28, "patch_size": 14, **LAYERS},
    "qformer_config": {"hidden_size": 16, "intermediate_size": 32, **LAYERS},
    "text_config": {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "vocab_size": 40,
    },
    "num_query_tokens": 5,
}
BLIP2["text_config"] |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}


def write_blip2(directory):
    """Write a tiny BLIP-2, its language model too, in Hugging Face's layout; return the model."""
    torch.manual_seed(0)
    model = Blip2Model(Blip2Config(**BLIP2)).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    model.save_pretrained(directory)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(directory)
    return model


def test_a_qformer_in_front_of_the_text(toy_llm_dir, tmp_path):
    own = write_blip2(tmp_path / "blip2")
    model = assemble(toy_llm_dir(), str(tmp_path / "blip2"), config_overrides=IN_FRONT)
    tower, config = model.get_vision_tower(), model.config
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    with torch.no_grad():
        expected = own.get_qformer_features(images)
        expected = getattr(expected, "last_hidden_state", expected)
        assert torch.allclose(tower(images), expected, atol=1e-5)
    num_queries = own.config.num_query_tokens
    assert (config.num_image_tokens, config.mm_hidden_size) == (num_queries, own.config.qformer_config.hidden_size)
    assert config.image_layout.num_tokens() == num_queries + 2
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    assert model(ids, images=images).logits.shape[1] == 3 + num_queries + 2
    model.save_pretrained(tmp_path / "saved")
    opened = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(opened(ids, images=images).logits, model(ids, images=images).logits)
    assert not any("language_model" in name for name, _ in opened.named_parameters())


@pytest.fixture
def imagebind(tmp_path):
    """The directory of a tiny ImageBind."""
    torch.manual_seed(0)
    ImageBindModel(ImageBindConfig(**SIZES)).save_pretrained(tmp_path / "imagebind")
    return str(tmp_path / "imagebind")


def test_imagebind_is_a_tower_of_one_vector(toy_llm_dir, imagebind, tmp_path, toy_tokenizer):
    overrides = {"mm_projector_type": "gated_mlp1x", "mm_injection": "adaption_prompt", "adaption_prompt_len": 1}
    model = assemble(toy_llm_dir(), imagebind, config_overrides=overrides | {"conv_template": "alpaca"})
    tower = model.get_vision_tower()
    own = ImageBindModel.from_pretrained(imagebind).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(tower(images)[:, 0], own.encode("image", images), atol=1e-5)
    assert tower.image_processor.crop_size["height"] == 28
    # Those of sounds never get a gradient.
    unread = {name for name, weight in tower.named_parameters() if weight in tower.unread()}
    assert any("audio" in name for name in unread)
    assert not any(".vision." in name for name in unread)
    model.save_pretrained(tmp_path / "saved")
    toy_tokenizer.save_pretrained(tmp_path / "saved")
    LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower.image_processor).save_pretrained(
        tmp_path / "saved"
    )
    _, opened, image_processor, _ = load_pretrained_model(str(tmp_path / "saved"), device="cpu")
    processor = LlavaLiteProcessor.from_config(opened.config, toy_tokenizer, image_processor)
    assert isinstance(reply(opened, processor, "What is it?", draw_image(0), max_new_tokens=3), str)
    features = opened.get_image_features(images).pooler_output
    assert [one.shape for one in features] == [(1, 32), (1, 32)]


def test_the_released_file_of_imagebind_is_a_tower_of_the_published_size(tmp_path):
    path = tmp_path / "imagebind_huge.pth"
    path.write_bytes(b"")
    check_source(str(path), "--vision_tower", VISION_TOWER)
    config = load_vision_config(str(path))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("imagebind", 1024, 32)
    with pytest.raises(NotADirectoryError, match="is a file; give the directory"):
        check_source(str(path), "--model_name_or_path")


def test_a_change_of_a_towers_config_reaches_no_other_model(toy_tower_dir):
    name = str(toy_tower_dir("clip"))
    load_vision_config(name).hidden_size = 1
    assert load_vision_config(name).hidden_size == 32
