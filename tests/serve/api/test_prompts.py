"""A chat request becomes the inputs that `reply` makes of the same questions, in every prompt format."""

import contextlib

import pytest
import torch
from api_server import data_url, show
from conftest import draw_image

from llava_lite.conversation import conv_templates
from llava_lite.inference import prepare
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.api.chat_request import ChatRequest
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits, read_image
from llava_lite.serve.api.prompts import Prompts

QUESTION = "What colour is the square?"


@pytest.fixture
def prompts(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model -> Prompts of it."""

    def make(**options):
        model = toy_model(**{"conv_template": "v1"} | options)
        image_processor = load_image_processor(toy_tower_dir("clip"))
        processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, image_processor)
        return Prompts(model, processor, ImageLimits(max_images=2), default_max_tokens=100)

    return make


def answers(prompts, messages, **fields):
    asked = ChatRequest.read({"model": "toy", "messages": messages} | fields)
    prompts.check_images(asked)
    images = [read_image(image, prompts.limits) for image in asked.images()]
    return prompts.answers(asked, images, [lambda event: None] * asked.n)


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("history", [[], [("Hello!", "Three circles.")]], ids=["", "history"])
def test_inputs_are_those_of_reply_in_every_format(prompts, num_images, history):
    made = prompts()
    images = [draw_image(i) for i in range(num_images)]
    roles = ("user", "assistant")
    earlier = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
    compared = 0
    for name in conv_templates:
        made.processor.conv_template = name
        # This tokenizer has no chat template, and formats of captions take no text without an image.
        with contextlib.suppress(ValueError):
            expected, _ = prepare(made.processor, [QUESTION], [images], None, [history])
            (answer,) = answers(made, [*earlier, *show(*images, text=QUESTION)])
            assert answer.inputs.keys() == expected.keys()
            assert all(torch.equal(answer.inputs[key], expected[key]) for key in expected), name
            compared += 1
    assert compared >= 30


def test_an_answer_may_be_as_long_as_asked_or_as_the_context_leaves(prompts):
    made = prompts(max_position_embeddings=120)
    assert made.context_len == 120
    (answer,) = answers(made, show())
    room = 120 - answer.prompt_len
    assert 0 < room == answer.max_new_tokens < 100
    assert answers(made, show(), max_tokens=room)[0].max_new_tokens == room
    with pytest.raises(RequestError, match=rf"context is 120 tokens.*max_tokens is {room + 1}") as refused:
        answers(made, show(), max_tokens=room + 1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="no place for an answer"):
        answers(made, show(text="red " * 100))


def test_several_answers_share_their_inputs_and_not_their_seeds(prompts):
    first, second = answers(prompts(), show(draw_image(1)), n=2, seed=4)
    assert first.inputs is second.inputs
    assert (first.sampling.seed, second.sampling.seed) == (4, 5)


def test_too_many_images_are_refused_before_any_is_read(prompts):
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,broken"}}] * 3
    with pytest.raises(RequestError, match="3 images; this server takes at most 2"):
        answers(prompts(), [{"role": "user", "content": broken}])
    good = {"type": "image_url", "image_url": {"url": data_url(draw_image(1))}}
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[1\]: cannot use the image"):
        answers(prompts(), [{"role": "user", "content": [good, broken[0]]}])
