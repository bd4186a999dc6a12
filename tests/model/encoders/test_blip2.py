"""The image side of BLIP-2 gives what transformers' Blip2Model gives, and reads nothing else of a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Model

from llava_lite.model.encoders.blip2 import Blip2Encoder, open_blip2

TINY = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "qformer_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    },
    "text_config": {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 32,
    },
    "num_query_tokens": 5,
}


def blip2(kind=Blip2Model, seed=0):
    torch.manual_seed(seed)
    model = kind(Blip2Config(**TINY)).eval()
    for param in model.parameters():
        param.data.normal_(std=0.2)
    return model


def images():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Blip2Model, Blip2ForConditionalGeneration])
def test_features_are_those_of_transformers(kind, tmp_path):
    model = blip2(kind)
    model.save_pretrained(tmp_path)
    encoder = open_blip2(tmp_path)
    with torch.no_grad():
        features = encoder(images())
        same_weights = Blip2Model(model.config).eval()
        same_weights.load_state_dict(model.state_dict())
        expected = same_weights.get_qformer_features(images())
        expected = expected if isinstance(expected, torch.Tensor) else expected.last_hidden_state
    assert features.shape == (2, 5, 16)
    # transformers gives the Q-Former a mask of ones besides.
    assert torch.allclose(features, expected, atol=1e-6)
    assert (encoder.num_features, encoder.hidden_size) == (5, 16)
    assert not encoder.training
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"vision_model", "qformer", "query_tokens"}


def test_shards_of_the_language_model_are_never_opened(tmp_path):
    model = blip2(Blip2ForConditionalGeneration)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {"image.safetensors": {}, "text.safetensors": {}}
    for name, tensor in state.items():
        shards["text.safetensors" if name.startswith("language") else "image.safetensors"][name] = tensor
    save_file(shards["image.safetensors"], tmp_path / "image.safetensors", {"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # There is no text.safetensors at all.
    encoder = open_blip2(str(tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_a_pickle_and_half_precision_are_read_too(tmp_path):
    model = blip2().half()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    encoder = open_blip2(tmp_path)
    assert encoder.query_tokens.dtype == torch.float16
    assert torch.equal(encoder.qformer.layernorm.weight, model.qformer.layernorm.weight)
    # transformers may keep the Q-Former of such a checkpoint in float32.
    encoder.qformer.float()
    encoder.query_tokens.data = encoder.query_tokens.data.float()
    with torch.no_grad():
        assert encoder(images().half()).dtype == torch.float32


def test_weights_that_do_not_fit_are_reported_by_name(tmp_path):
    model = blip2()
    state = model.state_dict()
    state.pop("qformer.layernorm.weight")
    state["vision_model.extra"] = torch.zeros(2)
    state["query_tokens"] = torch.zeros(1, 6, 16)
    state["qformer.embeddings.position_ids"] = torch.zeros(1, 8)
    model.config.save_pretrained(tmp_path)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    words = r"1 missing, such as \['qformer.layernorm.weight'\]; 1 unexpected, such as \['vision_model.extra'\]; "
    with pytest.raises(ValueError, match=words + r"1 of another size, such as \['query_tokens'\]"):
        open_blip2(tmp_path)


def test_directory_of_another_model_or_without_weights_is_refused(toy_tower_dir, tmp_path):
    with pytest.raises(ValueError, match="holds a model of model_type 'clip_vision_model', not BLIP-2"):
        open_blip2(toy_tower_dir("clip"))
    Blip2Config(**TINY).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"has no weights; looked for model.safetensors and pytorch_model.bin"):
        open_blip2(tmp_path)


def test_a_new_encoder_trains_and_is_saved(tmp_path):
    encoder = Blip2Encoder(Blip2Config(**TINY))
    assert encoder.query_tokens.std() > 0
    encoder(images()).square().sum().backward()
    assert encoder.query_tokens.grad.abs().sum() > 0
    encoder.save_pretrained(tmp_path)
    opened = open_blip2(tmp_path)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in opened.state_dict().items())
