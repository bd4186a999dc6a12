"""Ids and labels of records by the original rules of the systems, written out, and where an image stands in them."""

import numpy as np
import pytest
import torch
from conftest import draw_image

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import alpaca_prompt
from llava_lite.data.dataset import open_dataset
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.records.record import Record
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import load_image_processor

QUESTION, ANSWER = "What colour is the square?", "The square is red."


def record(*texts, images=(), **more):
    turns = tuple((("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    return Record("r", images, turns, "a.json[0]", **more)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["alpaca", "alpaca_short", "question_generation", "bare"])
def test_ids_and_labels_are_llama_adapters(toy_tokenizer, name):
    """[BOS] enc(prompt + answer) [EOS], with the length of [BOS] enc(prompt) masked."""
    ids, labels = RecordEncoder(toy_tokenizer, name)(record(QUESTION, ANSWER))
    prompt = alpaca_prompt(QUESTION, name=name)
    assert ids == [1, *ids_of(toy_tokenizer, prompt + ANSWER), 2]
    num_masked = 1 + len(ids_of(toy_tokenizer, prompt))
    assert labels == [IGNORE_INDEX] * num_masked + ids[num_masked:]


def test_a_caption_is_supervised_from_its_first_token(toy_tokenizer):
    shown = record("<image>\nDescribe it.", ANSWER, images=("1.png",))
    caption = ids_of(toy_tokenizer, ANSWER)
    ids, labels = RecordEncoder(toy_tokenizer, "caption")(shown)
    assert ids == [1, IMAGE_TOKEN_INDEX, *caption, 2]
    assert labels == [IGNORE_INDEX, IGNORE_INDEX, *caption, 2]
    ids, labels = RecordEncoder(toy_tokenizer, "caption", injection="adaption_prompt")(shown)
    assert (ids, labels) == ([1, *caption, 2], [IGNORE_INDEX, *caption, 2])


@pytest.mark.parametrize("template", ["alpaca", "accessory", "v1", "caption", "llama_2", "chat"])
def test_an_image_in_front_stands_right_after_bos_before_the_text_alone(toy_tokenizer_for, template):
    tokenizer = toy_tokenizer_for("qwen" if template == "chat" else "llama")
    shown = record(f"{QUESTION}\n<image>", ANSWER, images=("1.png",))
    ids, labels = RecordEncoder(tokenizer, template, image_position="front")(shown)
    alone = RecordEncoder(tokenizer, template)(record(QUESTION, ANSWER))
    at = 0 if template == "chat" else 1
    assert ids == [*alone[0][:at], IMAGE_TOKEN_INDEX, *alone[0][at:]]
    assert labels == [*alone[1][:at], IGNORE_INDEX, *alone[1][at:]]
    # Inside attention the image has no place at all.
    assert RecordEncoder(tokenizer, template, injection="adaption_prompt")(shown) == alone


def test_a_placeholder_survives_where_images_are_tokens(toy_tokenizer):
    ids, _ = RecordEncoder(toy_tokenizer, "alpaca")(record(f"{QUESTION}\n<image>", ANSWER, images=("1.png",)))
    at = ids.index(IMAGE_TOKEN_INDEX)
    prompt = alpaca_prompt(f"\n{QUESTION}").split(f"\n{QUESTION}")
    assert ids[1:at] == ids_of(toy_tokenizer, prompt[0])
    assert ids[at + 1 : -1] == ids_of(toy_tokenizer, f"\n{QUESTION}{prompt[1]}{ANSWER}")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"injection": "adaption_prompt"}, "mm_injection adaption_prompt"),
        ({"image_position": "front"}, "mm_image_pos"),
    ],
)
def test_several_images_of_a_record_are_refused_with_its_id(toy_tokenizer, options, flag):
    two = record("<image> or <image>", ANSWER, images=("1.png", "2.png"))
    with pytest.raises(DataError, match=rf"record 'r' \(a.json\[0\]\) has 2 images; --{flag}.* one image a record"):
        RecordEncoder(toy_tokenizer, "v1", **options)(two)


def test_unknown_choices_are_refused_with_the_known_ones(toy_tokenizer):
    with pytest.raises(ValueError, match="unknown injection 'prefix'; known: tokens, adaption_prompt"):
        RecordEncoder(toy_tokenizer, "v1", injection="prefix")
    with pytest.raises(ValueError, match="unknown image_position 'back'; known: placeholder, front"):
        RecordEncoder(toy_tokenizer, "v1", image_position="back")


def test_the_fingerprint_holds_where_images_stand_and_is_as_before_by_default(toy_tokenizer):
    keys = {
        RecordEncoder(toy_tokenizer, "v1", injection=injection, image_position=position).fingerprint
        for injection in ("tokens", "adaption_prompt")
        for position in ("placeholder", "front")
    }
    assert len(keys) == 4
    assert RecordEncoder(toy_tokenizer, "v1").fingerprint in keys


def test_a_template_of_one_question_uses_the_first_pair(toy_tokenizer):
    talk = record(QUESTION, ANSWER, "Why?", "Because.", not_supervised=frozenset({3}))
    encoder = RecordEncoder(toy_tokenizer, "alpaca")
    assert encoder(talk) == encoder(record(QUESTION, ANSWER))
    assert encoder.measure(talk) == encoder.measure(record(QUESTION, ANSWER))


def test_a_record_may_have_a_template_of_its_own(toy_tokenizer):
    own = record(QUESTION, ANSWER, template="alpaca_short")
    assert RecordEncoder(toy_tokenizer, "v1")(own) == RecordEncoder(toy_tokenizer, "alpaca_short")(own)
    assert RecordEncoder(toy_tokenizer, "v1")(own) != RecordEncoder(toy_tokenizer, "v1")(record(QUESTION, ANSWER))


@pytest.mark.parametrize("question", ["<image>", "<image>\n", " <image> "])
def test_a_question_without_words_asks_for_a_caption_in_alpaca_alone(toy_tokenizer, question):
    silent = record(question, ANSWER, images=("1.png",))
    asked = record("<image>\nGenerate caption of this image", ANSWER, images=("1.png",))
    for name, is_asked in {"alpaca": True, "v1": False, "bare": False, "caption": True}.items():
        encoder = RecordEncoder(toy_tokenizer, name)
        assert (encoder(silent) == encoder(asked)) is is_asked
    encoder = RecordEncoder(toy_tokenizer, "alpaca", injection="adaption_prompt")
    assert encoder(silent) == encoder(record("Generate caption of this image", ANSWER))


@pytest.mark.parametrize("injection", ["tokens", "adaption_prompt"])
def test_lengths_of_the_index_are_those_of_the_examples(tmp_path, write_json, toy_tokenizer, toy_tower_dir, injection):
    draw_image(1).save(tmp_path / "1.png")
    turns = [{"from": "human", "value": "<image>\nHow?"}, {"from": "gpt", "value": "So."}]
    records = [{"id": "a", "image": "1.png", "conversations": turns}]
    records += [{"id": "b", "conversations": [{"from": "human", "value": "Why?"}, turns[1]]}]
    dataset, report = open_dataset(
        write_json(records), toy_tokenizer, load_image_processor(toy_tower_dir("clip")), "alpaca", str(tmp_path),
        layout=ImageLayout(16), injection=injection,
    )  # fmt: skip
    examples = [dataset[i] for i in range(2)]
    lengths = [len(example["input_ids"]) for example in examples]
    assert dataset.lengths.tolist() == report.lengths.tolist() == lengths
    places = [int((example["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for example in examples]
    assert places == [16 if injection == "tokens" else 0, 0]
    # The image is there even where it has no place in the text.
    assert isinstance(examples[0]["images"][0], torch.Tensor)
    assert examples[0]["image_sizes"] == [draw_image(1).size]
    assert np.array_equal(dataset.has_image, [True, False])
