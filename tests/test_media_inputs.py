"""Answers about media: an ImageBind tower, images in training, sounds at inference."""

import math
import wave

import pytest
import torch
from conftest import draw_image

from llava_lite.configuration import CONFIGS
from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.inference import reply
from llava_lite.media.load import load_media
from llava_lite.media_inputs import media_features
from llava_lite.model import model_class_for
from llava_lite.model.mixing import FeatureBank
from llava_lite.processing.processor import LlavaLiteProcessor

SIZES = {"hidden_size": 16, "image_size": 28, "vision_width": 16, "num_hidden_layers": 2, "vision_num_heads": 2}
SIZES |= {"audio_width": 16, "audio_num_layers": 1, "audio_num_heads": 2, "modalities": ["image", "audio"]}


def build(tokenizer):
    torch.manual_seed(0)
    vision = ImageBindConfig(**SIZES)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
    config = CONFIGS["llama"](
        **text,
        vision_config=vision.to_dict(),
        mm_injection="adaption_prompt",
        adaption_prompt_len=1,
        mm_projector_type="gated_mlp1x",
        conv_template="alpaca",
    )
    model = model_class_for("llama")(config).eval()
    for layer in model.model.layers:
        layer.self_attn.adaption_gate.data.normal_(std=2.0)
    return model


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        tone = (int(12000 * math.sin(2 * math.pi * 440 * i / 16000)) for i in range(8000))
        file.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in tone))
    return path


def test_a_model_answers_about_a_sound_as_about_the_features_of_it(toy_tokenizer, sound):
    model = build(toy_tokenizer)
    processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, model.get_vision_tower().image_processor)
    options = {"max_new_tokens": 6}
    heard = reply(model, processor, "What is it?", media={"audio": str(sound)}, **options)
    clips = load_media("audio", str(sound))
    embedding = model.get_vision_tower().encoder.encode("audio", clips[None])
    embedding = embedding / embedding.norm(dim=-1, keepdim=True)
    assert torch.allclose(media_features(model, {"audio": clips}), embedding[:, None], atol=1e-5)
    prompt = processor.encode([processor.render([("What is it?", None)])], [[]])["input_ids"]
    tokens = model.generate(prompt, images=None, image_features=embedding[:, None], max_new_tokens=6, do_sample=False)
    assert heard == processor.decode(tokens[0], skip_special_tokens=True).strip()


def test_media_are_mixed_by_weight_and_pulled_towards_a_bank(toy_tokenizer, sound):
    model = build(toy_tokenizer)
    tower, image = model.get_vision_tower(), load_media("image", draw_image(0), side=28)
    alone = {kind: media_features(model, {kind: one}) for kind, one in (("image", image), ("audio", str(sound)))}
    mixed = media_features(model, {"image": [image, 3.0], "audio": [str(sound), 1.0]})
    assert torch.allclose(mixed, 0.75 * alone["image"] + 0.25 * alone["audio"], atol=1e-5)
    assert torch.allclose(alone["image"][:, 0], tower(image[None])[:, 0], atol=1e-5)
    bank = FeatureBank(torch.randn(20, 16))
    assert not torch.allclose(media_features(model, {"audio": str(sound)}, bank), alone["audio"], atol=1e-2)


def test_a_saved_model_with_imagebind_opens_as_it_was(toy_tokenizer, tmp_path):
    model = build(toy_tokenizer)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    ids, image = torch.tensor([[1, 5, 6, 7]]), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(opened(ids, images=image).logits, model(ids, images=image).logits)
    assert opened.config.num_image_tokens == 1


def test_media_that_the_tower_does_not_read_are_refused(toy_tokenizer, toy_model):
    model = build(toy_tokenizer)
    with pytest.raises(ValueError, match=r"reads image, audio .* model_type 'imagebind'\) and got point"):
        media_features(model, {"point": "cloud.npy"})
    with pytest.raises(ValueError, match=r"reads image .*'clip_vision_model'.* and got audio"):
        media_features(toy_model(), {"audio": "a.wav"})
    with pytest.raises(ValueError, match="media are for a model with ImageBind as its tower"):
        media_features(toy_model(), {"image": "a.png"})
    for media, message in (
        ("a.wav", "media is a dict of kinds, such as"),
        ({"image": ["a.png", "b.png"]}, r"expected one source, or \[source, weight\] with a number"),
        ({"image": [torch.zeros(3, 28, 28), float("nan")]}, "weights of media are 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            media_features(model, media)
    with pytest.raises(ValueError, match="feature_bank is for media="):
        reply(model, None, "What?", feature_bank="bank")
    with pytest.raises(ValueError, match="media is empty; give one or more of image, audio"):
        media_features(model, {})
