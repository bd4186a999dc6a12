"""Examples of the page are questions of a file."""

import json
from pathlib import Path

import pytest
from conftest import draw_image

from llava_lite.serve.demo_examples import NUM_EXAMPLES, find_examples, read_examples


@pytest.fixture
def directory(tmp_path):
    for i in range(NUM_EXAMPLES + 2):
        draw_image(i).save(tmp_path / f"{i}.png")
    return tmp_path


def write(path, records, as_list=False):
    text = json.dumps(records) if as_list else "".join(json.dumps(record) + "\n\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("as_list", [True, False])
def test_questions_of_answer_and_of_the_quickstart_are_read(directory, as_list):
    records = [
        {"text": "One?", "image": "0.png"},
        {"question": "Both?", "image": ["0.png", "1.png"]},
        {"text": "None?"},
    ]
    found = read_examples(write(directory / "examples.jsonl", records, as_list))
    zero, one = str(directory / "0.png"), str(directory / "1.png")
    assert found == [("One?", [zero]), ("Both?", [zero, one]), ("None?", [])]


def test_one_question_an_image_and_not_more_than_fit(directory):
    records = [{"text": f"{i} {turn}", "image": f"{i}.png"} for i in range(NUM_EXAMPLES + 2) for turn in "ab"]
    found = read_examples(write(directory / "q.jsonl", records))
    assert [text for text, _ in found] == [f"{i} a" for i in range(NUM_EXAMPLES)]


def test_different_questions_come_first(directory):
    records = [{"text": text, "image": f"{i}.png"} for i, text in enumerate(["a", "a", "b", "a", "c"])]
    found = read_examples(write(directory / "q.jsonl", records))
    assert [(text, Path(paths[0]).stem) for text, paths in found] == [
        ("a", "0"),
        ("b", "2"),
        ("c", "4"),
        ("a", "1"),
        ("a", "3"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "What?", "image": "gone.png"}, r"gone\.png of 'What\?' is not there"),
        ({"prompt": "What?"}, r"an example is an object with a text in 'text' .* got \{\"prompt\""),
        ({"text": "What?", "image": 3}, "an example is an object"),
        ("What?", "an example is an object"),
    ],
)
def test_what_is_no_example_is_named_with_its_file(directory, record, message):
    with pytest.raises(ValueError, match=rf"q\.jsonl: .*{message}"):
        read_examples(write(directory / "q.jsonl", [record]))


def test_what_is_no_json_is_named(directory):
    (directory / "q.jsonl").write_text("What?")
    with pytest.raises(ValueError, match=r"q\.jsonl is no JSON: "):
        read_examples(directory / "q.jsonl")


def test_the_examples_of_the_first_model_that_has_some_are_offered(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "examples.jsonl").touch()
    (tmp_path / "c" / "examples.jsonl").touch()
    assert find_examples([tmp_path / name for name in "abc"]) == tmp_path / "b" / "examples.jsonl"
    assert find_examples(["user/name"]) is None
