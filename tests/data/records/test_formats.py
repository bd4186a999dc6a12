"""Formats of other systems: read as what they mean, or named with the command that converts them."""

import pickle

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.records.formats import ForeignRecord
from llava_lite.data.records.record import parse_record


def test_the_cauldron_and_finevision_put_all_images_before_the_first_question():
    texts = [{"user": "q", "assistant": "a", "source": "x"}, {"user": "r", "assistant": "b", "source": "x"}]
    item = {"images": ["1.png", "2.png"], "texts": texts, "relevance_ratings": [5, 4]}
    record = parse_record(item, "here")
    assert record.images == ("1.png", "2.png")
    assert record.turns == (("human", "<image>\n<image>\nq"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
    assert parse_record({"texts": texts, "images": []}, "here").turns[0] == ("human", "q")
    with pytest.raises(DataError, match="'texts' have <image>, but the images of this format have no placeholders"):
        parse_record({"images": ["1.png"], "texts": [{"user": "<image>q", "assistant": "a"}]}, "here")


@pytest.mark.parametrize("prompt", ["q", [{"role": "user", "content": "q"}]])
@pytest.mark.parametrize("completion", ["a", [{"role": "assistant", "content": "a"}]])
def test_prompt_and_completion_are_a_question_and_its_answer(prompt, completion):
    item = {"prompt": prompt, "completion": completion}
    assert parse_record(item, "here").turns == (("human", "q"), ("gpt", "a"))
    # As TRL does without a placeholder.
    assert parse_record(item | {"image": "1.png"}, "here").turns[0] == ("human", "<image>\nq")


def test_answers_in_a_prompt_are_context_and_not_supervised():
    roles = ("system", "user", "assistant", "user")
    prompt = [{"role": role, "content": role} for role in roles]
    record = parse_record({"prompt": prompt, "completion": [{"role": "assistant", "content": "a"}]}, "here")
    assert record.system == "system"
    assert [role for role, _ in record.turns] == ["human", "gpt", "human", "gpt"]
    assert record.not_supervised == {1}


@pytest.mark.parametrize("key", ["caption", "text", "txt"])
@pytest.mark.parametrize("image_key", ["image", "images"])
def test_an_image_and_its_caption_are_a_record(key, image_key):
    record = parse_record({image_key: "1.png", key: " a cat\n"}, "here")
    assert record.images == ("1.png",)
    assert record.turns == (("human", "<image>"), ("gpt", "a cat"))


@pytest.mark.parametrize(
    ("item", "question"),
    [
        ({"input": "rot"}, "Translate.\n\n### Input:\nrot"),
        ({"input": ""}, "Translate."),
        ({"input": " \n"}, "Translate."),
        ({"input": None}, "Translate."),
        ({}, "Translate."),
        ({"image": "1.png", "input": "rot"}, "<image>\nTranslate.\n\n### Input:\nrot"),
        ({"instruction": "See\n<image>", "image": "1.png"}, "See\n<image>"),
    ],
)
def test_an_alpaca_object_is_a_question_with_its_input_and_an_answer(item, question):
    record = parse_record({"instruction": "Translate.", "output": " red"} | item, "here")
    assert record.turns == (("human", question), ("gpt", " red"))
    assert record.images == (("1.png",) if "image" in item else ())


def test_the_url_of_a_caption_is_its_image_unless_there_is_one():
    record = parse_record({"url": "/data/1.png", "caption": "a cat", "width": 3}, "here")
    assert (record.images, record.turns) == (("/data/1.png",), (("human", "<image>"), ("gpt", "a cat")))
    assert parse_record({"url": "http://a/1.png", "image": "b.png", "caption": "a cat"}, "here").images == ("b.png",)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": "1.png", "caption": " "}, "the caption is empty"),
        ({"instruction": 3, "output": "o"}, "'instruction' is int 3, expected a string"),
        ({"instruction": "i", "input": ["a"], "output": "o"}, "'input' is list, expected a string"),
        ({"instruction": "<image>", "output": "o", "image": ["1.png", "2.png"]}, "1 <image> placeholders .* 2 images"),
        ({"url": "1.png", "caption": " "}, "the caption is empty"),
        ({"image": ["1.png", "2.png"], "caption": "c"}, "2 images and a caption; expected one"),
        ({"image": "1.png", "caption": "c", "text": "d"}, "'caption' and 'text', which differ"),
        ({"text": "only words"}, "'conversations' is NoneType None"),
        ({"image": "1.png"}, "the record has 'image'"),
        ({"image": "1.png", "caption": "c", "question": "q", "tools": ["f"]}, "tools|'conversations'"),
        ({"prompt": 7, "completion": "a"}, "'prompt' is int 7"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
        (
            {"instruction": "i", "output": "o", "question": "q", "answer": "a"},
            "could be Alpaca or question and answer",
        ),
    ],
)
def test_what_is_no_record_of_any_format_is_refused(item, words):
    with pytest.raises(DataError, match=words) as error:
        parse_record(item, "here")
    assert not isinstance(error.value, ForeignRecord)


@pytest.mark.parametrize(
    ("item", "name", "options"),
    [
        ({"instruction": "i", "output": "o", "history": [["x", "y"]]}, "Alpaca with a history", ""),
        ({"query": "q", "response": "a", "history": [["x", "y"]]}, "query and response", ""),
        ({"image": "1.png", "question": "q", "answer": "a"}, "question and answer", ""),
        ({"image_url": "http://a", "question": "q", "answer": "a"}, "question and answer", "--image_key image_url"),
        ({"image": "1.png", "question": "q", "answers": ["a", "b"]}, "question and answer", ""),
        ({"image": "1.png", "captions": ["a", "b"]}, "an image and its captions", "--answers first"),
        ({"image": "1.png", "caption": ["a", "b"]}, "an image and its captions", "--answers first"),
        ({"img": "1.png", "caption": "c"}, "an image and its caption, the image under another key", "--image_key img"),
        ({"file_name": "1.png", "text": "c"}, "an image and its caption, the image under another key", "--image_key"),
        ({"images": [{"id": 1}], "annotations": [{"caption": "c"}]}, "COCO captions", "--answers first"),
        ({"questions": [{"question": "q"}]}, "VQA questions", "--annotations ANSWERS.json --answers majority"),
        ({"one": {"root": "a", "annotation": "a.jsonl"}}, "InternVL meta", ""),
        ({"mine": {"file_name": "a.json"}}, "LLaMA-Factory dataset_info", "--dataset mine"),
    ],
)
def test_a_format_that_is_converted_first_is_named_with_the_command(item, name, options):
    with pytest.raises(ForeignRecord) as error:
        parse_record(item, "train.json[0]")
    assert error.value.format_name == name
    assert error.value.options.startswith(options)
    assert f"llava-lite data convert train.json OUT.json {options}".strip() in str(error.value)
    # As it comes from a worker process.
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.format_name, again.options) == (str(error.value), name, error.value.options)


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ({"text_list": ["a"], "image_info": []}, "MMC4"),
        ({"images": ["u", None], "texts": [None, "a"]}, "OBELICS"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, "VQA answers"),
    ],
)
def test_a_format_that_nothing_converts_is_named_with_the_reason(item, name):
    with pytest.raises(ForeignRecord, match=f"is of the format '{name}', which is not supported: ") as error:
        parse_record(item, "here")
    assert error.value.options is None
