"""Every kind loads into the shape that ImageBind reads, at the sizes of the encoder."""

import io
import json
import wave

import numpy as np
import pytest
import torch
from conftest import draw_image
from toy_imagebind import randomise, tiny_config
from transformers import CLIPTokenizer

from llava_lite.imagebind_config import BRANCHES, ImageBindConfig
from llava_lite.media.load import MEDIA, load_media
from llava_lite.model.encoders.imagebind.model import ImageBindModel, sample_shape


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def wav():
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((1000 * np.sin(np.arange(16000) / 20)).astype("<i2").tobytes())
    return stream.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {letter: index for index, letter in enumerate("abcdef")} | {"f</w>": 6, "<|startoftext|>": 7}
    return CLIPTokenizer(vocab=vocab | {"<|endoftext|>": 8}, merges=[])


def sources(config):
    random = np.random.default_rng(0)
    return {
        "image": draw_image(0),
        "audio": wav(),
        "depth": npy(random.uniform(1, 5, (40, 50))),
        "thermal": draw_image(1),
        "imu": npy(random.normal(size=(config.imu_num_channels, config.imu_len))),
        "point": npy(random.normal(size=(40, 3))),
        "text": "abc f",
    }


def test_table_knows_what_the_encoder_knows():
    assert set(MEDIA) == set(BRANCHES)
    with pytest.raises(ValueError, match="unknown kind of media 'smell'; known: image, video, text, audio"):
        load_media("smell", b"")


def test_loaded_samples_are_what_a_tiny_encoder_reads(tokenizer):
    config = tiny_config()
    model = randomise(ImageBindModel(config))
    for kind, source in sources(config).items():
        options = config.media_options(kind) | ({"tokenizer": tokenizer} if kind == "text" else {})
        sample = load_media(kind, source, **options)
        with torch.no_grad():
            embedding = model.encode(kind, sample[None])
        assert embedding.shape == (1, config.hidden_size), kind
        assert torch.isfinite(embedding).all(), kind


def test_defaults_are_the_sizes_of_the_published_encoder(tokenizer):
    config = ImageBindConfig()
    for kind, source in sources(config).items():
        sample = load_media(kind, source, **({"tokenizer": tokenizer} if kind == "text" else {}))
        shape = sample_shape(kind, config)
        assert all(want in (None, have) for want, have in zip(shape, sample.shape[-len(shape) :], strict=True)), kind
        options = config.media_options(kind) | ({"tokenizer": tokenizer} if kind == "text" else {})
        assert torch.equal(load_media(kind, source, **options), sample), kind
    assert json.dumps({kind: config.media_options(kind) for kind in BRANCHES})
