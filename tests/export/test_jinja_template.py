"""Chat templates in Jinja: letter for letter the prompts of our own formats."""

import pytest
from PIL import Image

from llava_lite.conversation import conv_templates
from llava_lite.export.jinja_template import write_jinja
from llava_lite.processing import LlavaLiteProcessor

PICTURE = {"type": "image", "image": Image.new("RGB", (9, 9))}


def words(text):
    return {"type": "text", "text": text}


TALKS = {
    "a picture and a question": [{"role": "user", "content": [PICTURE, words("What is it?")]}],
    "a mark in the middle of a text": [{"role": "user", "content": " Look: <image> - what is it? "}],
    "a picture alone": [{"role": "user", "content": [PICTURE]}],
    "no picture": [{"role": "user", "content": "Hello!"}],
    "two pictures, then more": [
        {"role": "user", "content": [words("Compare this"), PICTURE, words("with this"), PICTURE]},
        {"role": "assistant", "content": [words("Both are red.")]},
        {"role": "user", "content": [words("Why?")]},
    ],
    "a system text and a last answer": [
        {"role": "system", "content": [words("Be brief.\nBe kind.")]},
        {"role": "user", "content": [PICTURE, words(" What is it? ")]},
        {"role": "assistant", "content": "A USER: MARK."},
    ],
}


@pytest.mark.parametrize("use_im_start_end", [False, True])
@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("name", conv_templates)
def test_jinja_writes_the_prompt_of_the_format(toy_tokenizer_for, name, talk, use_im_start_end):
    tokenizer = toy_tokenizer_for("qwen")
    processor = LlavaLiteProcessor(None, tokenizer, conv_template=name, use_im_start_end=use_im_start_end)
    is_open = talk[-1]["role"] == "user"
    written = tokenizer.apply_chat_template(
        talk,
        chat_template=write_jinja(name, use_im_start_end, own=tokenizer.chat_template),
        tokenize=False,
        add_generation_prompt=is_open,
    )
    if "plain" in name and not written:
        # It keeps pictures alone; without one there is no prompt.
        with pytest.raises(ValueError, match="nothing is left"):
            processor.apply_chat_template(talk, add_generation_prompt=is_open)
    else:
        assert written == processor.apply_chat_template(talk, add_generation_prompt=is_open)


@pytest.mark.parametrize("name", ["v1", "chat", "llama_2"])
def test_blank_is_written_behind_a_picture_that_has_none(toy_tokenizer_for, name):
    tokenizer = toy_tokenizer_for("qwen")
    talk = [{"role": "user", "content": "<image><image>\nOne and <image> two"}]
    plain, spread = (
        tokenizer.apply_chat_template(
            talk,
            chat_template=write_jinja(name, own=tokenizer.chat_template, blank_after_picture=blank),
            tokenize=False,
        )
        for blank in (False, True)
    )
    assert "<image><image>\nOne and <image> two" in plain
    # Between two pictures there is no text, and the third has its blank.
    assert spread == plain.replace("<image>\nOne", "<image> \nOne")


def test_format_chat_needs_a_template_of_the_tokenizers_own():
    with pytest.raises(ValueError, match="this tokenizer has none"):
        write_jinja("chat")
