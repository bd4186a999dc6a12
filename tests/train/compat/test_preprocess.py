"""LLaVA's preprocess functions give the ids of prompts written out here, and supervise the answers in them."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.train.compat.preprocess import (
    preprocess,
    preprocess_llama_2,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
)

S = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = S.replace("user", "human")
CHATML = "<|im_start|>system\nAnswer the questions."
CONVERSATION = [("human", "Q one?"), ("gpt", "A one."), ("human", "Q two?"), ("gpt", "A two.")]
# Template: the text of CONVERSATION, and its pieces that are supervised.
WRITTEN = {
    "v1": (
        f"{S} USER: Q one? ASSISTANT: A one.</s>USER: Q two? ASSISTANT: A two.</s>",
        [" A one.</s>", " A two.</s>"],
    ),
    "mistral_instruct": (
        "[INST] Q one? [/INST] A one. </s>[INST] Q two? [/INST] A two. </s>",
        [" A one. </s>", " A two. </s>"],
    ),
    "mistral_direct": (
        f"{CHATML}<|im_end|><|im_start|>user\nQ one?<|im_end|><|im_start|>assistant\nA one.<|im_end|>"
        "<|im_start|>user\nQ two?<|im_end|><|im_start|>assistant\nA two.<|im_end|>",
        ["A one.<|im_end|>", "A two.<|im_end|>"],
    ),
    "llava_v0": (
        f"{HUMAN}\n\n### Human: Q one?\n### Assistant: A one.\n### Human: Q two?\n### Assistant: A two.\n### ",
        ["###", "### Assistant: A one.\n", "###", "### Assistant: A two.\n", "### "],
    ),
}


def conversation_of(turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_are_those_of_the_prompt_and_the_answers_are_supervised(toy_tokenizer_for, speak, name):
    tokenizer = toy_tokenizer_for("gpt2")
    speak(name)
    text, supervised = WRITTEN[name]
    encoded = preprocess([conversation_of(CONVERSATION)], tokenizer)
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    assert ids.tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "".join(supervised)
    # A label stands where its token stands.
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])


@pytest.mark.parametrize("name", ["v1", "llava_v0"])
def test_an_image_is_one_placeholder_and_never_supervised(toy_tokenizer, speak, name):
    speak(name)
    source = conversation_of([("human", "<image>\nQ?"), ("gpt", "A.")])
    with_image = preprocess([source], toy_tokenizer, has_image=True)
    as_text = preprocess([source], toy_tokenizer, has_image=False)
    ids, labels = with_image["input_ids"][0], with_image["labels"][0]
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 1
    assert IMAGE_TOKEN_INDEX not in labels
    assert IMAGE_TOKEN_INDEX not in as_text["input_ids"][0]


def test_captions_drop_the_instruction_and_supervise_the_newline(toy_tokenizer_for, speak):
    tokenizer = toy_tokenizer_for("gpt2")
    speak("plain")
    source = conversation_of([("human", "Describe it.\n<image>"), ("gpt", "A red square.")])
    encoded = preprocess([source], tokenizer)
    caption = tokenizer("A red square.\n")["input_ids"]
    assert [row.tolist() for row in encoded["input_ids"]] == [[IMAGE_TOKEN_INDEX, *caption]]
    assert [row.tolist() for row in encoded["labels"]] == [[IGNORE_INDEX, *caption]]
    assert preprocess_plain([source], tokenizer)["labels"][0].tolist() == [IGNORE_INDEX, *caption]


def test_conversations_without_images_are_padded_to_one_length_and_cut_at_the_maximum(toy_tokenizer, speak):
    speak("v1")
    toy_tokenizer.pad_token, toy_tokenizer.model_max_length = "<unk>", 60
    short, long = conversation_of(CONVERSATION[:2]), conversation_of([("human", "Q?"), ("gpt", "word " * 100)])
    encoded = preprocess([short, long], toy_tokenizer)
    assert encoded["input_ids"].shape == encoded["labels"].shape == (2, 60)
    alone = preprocess([short], toy_tokenizer)
    num_tokens = alone["input_ids"].shape[1]
    assert torch.equal(encoded["input_ids"][0, :num_tokens], alone["input_ids"][0])
    assert (encoded["input_ids"][0, num_tokens:] == toy_tokenizer.unk_token_id).all()
    assert (encoded["labels"][0, num_tokens:] == IGNORE_INDEX).all()
    assert preprocess([long], toy_tokenizer, has_image=True)["input_ids"].shape[1] > 60


def test_a_function_for_another_style_than_the_default_says_so(toy_tokenizer, speak):
    speak("v1")
    assert torch.equal(
        preprocess_v1([conversation_of(CONVERSATION)], toy_tokenizer)["labels"],
        preprocess([conversation_of(CONVERSATION)], toy_tokenizer)["labels"],
    )
    with pytest.raises(ValueError, match="has the style TWO, expected LLAMA_2"):
        preprocess_llama_2([conversation_of(CONVERSATION)], toy_tokenizer)


@pytest.mark.parametrize(
    ("text", "template", "start_end", "expected"),
    [
        ("Q?\n<image>", "v1", False, "<image>\nQ?"),
        ("<image>", "v1", True, "<im_start><image><im_end>"),
        ("a <image> b", "v1_mmtag", False, "<Image><image></Image>\na  b"),
        ("a <image> b <image>", "v1", False, "a <image> b <image>"),
        ("no mark ", "v1", True, "no mark "),
    ],
)
def test_placeholders_are_put_where_the_model_reads_them(speak, text, template, start_end, expected):
    speak(template)
    sources = [conversation_of([("human", text), ("gpt", "A.")])]
    data_args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=start_end)
    assert preprocess_multimodal(sources, data_args) is sources
    assert sources[0] == conversation_of([("human", expected), ("gpt", "A.")])
    data_args.is_multimodal = False
    assert preprocess_multimodal([conversation_of([("human", text)])], data_args) == [
        conversation_of([("human", text)])
    ]
