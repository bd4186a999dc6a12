"""The world in the files of LLaMA-Adapter, ImageBind-LLM and LLaMA2-Accessory."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from llava_lite.data.index.mixtures import read_mixture
from llava_lite.data.single_turn import convert_file
from playground.tiny import other_worlds


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    roots = {system: tmp_path_factory.mktemp(system) for system in ("accessory", "imagebind")}
    for system, root in roots.items():
        other_worlds.make_other_world(system, root, scale=0.003)
        convert_file(str(root / "conversations.json"), str(root / "single_turn.json"))
    return roots


@pytest.mark.parametrize("system", ["accessory", "imagebind"])
def test_a_caption_file_names_images_that_exist(roots, system):
    root = roots[system]
    assert [entry.path for entry in read_mixture(str(root / "captions.yaml"))] == [str(root / "captions.csv")]
    header, *lines = (root / "captions.csv").read_text().splitlines()
    assert header == "url\tcaption"
    assert len(lines) == 58
    for name, caption in (line.split("\t") for line in lines):
        with Image.open(root / name) as image:
            assert image.size == (56, 56)
        assert caption.endswith(".")
        assert caption.count(",") == 0 or system == "accessory"


@pytest.mark.parametrize("system", ["accessory", "imagebind"])
def test_instructions_have_one_question_each(roots, system):
    root = roots[system]
    (entry,) = read_mixture(str(root / "instructions.yaml"))
    assert (entry.path, entry.recipe) == (str(root / "single_turn.json"), "single_turn_llava")
    records = json.loads((root / "single_turn.json").read_text())
    assert all([turn["from"] for turn in record["conversations"]] == ["human", "gpt"] for record in records)
    assert all((root / record["image"]).is_file() for record in records if "image" in record)
    assert any("image" not in record for record in records)


def test_held_out_questions_about_one_digit_are_balanced_and_ask_about_sounds(roots):
    directory = roots["imagebind"] / "held_out"
    questions = json.loads((directory / "questions.json").read_text())
    for kind, fraction in {"digit": 1 / 10, "colour": 1 / 8, "caption": 1 / 80, "sound": 1 / 10}.items():
        asked = [q for q in questions if q["kind"] == kind]
        answers = Counter(q["answer"] for q in asked)
        assert {count / len(asked) for count in answers.values()} == {fraction}
        files = [q["sound" if kind == "sound" else "image"] for q in asked]
        assert len(set(files)) == len(files)
        assert all((directory / name).is_file() for name in files)
    heard, seen = (next(q["question"] for q in questions if q["kind"] == kind) for kind in ("sound", "digit"))
    assert heard == seen


def test_a_question_about_one_digit_does_not_name_its_place():
    digit, colour = np.array([-1, 7, -1, -1]), np.array([-1, 2, -1, -1])
    asked = other_worlds.one_digit_questions(digit, colour)
    assert [question.answer for question in asked] == ["7", "yellow", "yellow 7."]
