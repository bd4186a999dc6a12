"""easy-VQA as LLaVA's records: what the training split says and no more; the path of run.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoTokenizer

from playground.easy_vqa import llm, make_data

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (255, 0, 0), "teal": (0, 128, 128), "blue": (0, 0, 255)}
# Of each image: colour and shape as drawn, and its questions. Those of the last three leave something open.
TRAIN = [
    ("red", "circle", [("what shape is present?", "circle"), ("what color is the circle?", "red")]),
    ("teal", "rectangle", [("is there not a teal shape?", "no"), ("does the image contain a rectangle?", "yes")]),
    ("teal", "rectangle", [("is no red shape present?", "yes"), ("what is the color of the shape?", "teal")]),
    ("red", "rectangle", [("is a circle present?", "no"), ("is there not a triangle in the image?", "yes")]),
    ("red", "circle", [("is there a teal shape?", "no")]),
]
TEST = [("blue", "circle", [("what shape is present?", "circle"), ("is there a red shape?", "no")])]
CAPTIONS = {0: "a red circle", 1: "a teal rectangle"}


def write_split(directory, images):
    """Write images and questions as the package easy-vqa keeps them."""
    (directory / "images").mkdir(parents=True)
    rows = [[*pair, number] for number, (*_, questions) in enumerate(images) for pair in questions]
    (directory / "questions.json").write_text(json.dumps(rows))
    for number, (colour, shape, _) in enumerate(images):
        image = Image.new("RGB", (64, 64), (240, 245, 250))
        draw = {"circle": "ellipse", "rectangle": "rectangle"}[shape]
        getattr(ImageDraw.Draw(image), draw)((2, 30, 22, 50), fill=COLOURS[colour])
        image.save(directory / f"images/{number}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("easy_vqa")
    write_split(directory / "train", TRAIN)
    write_split(directory / "test", TEST)
    return directory


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    make_data.make_data(directory, data, num_copies=3)
    return directory


def read(path):
    return json.loads(path.read_text())


def number_of(record):
    """Return the number of the image that a record is about, in the package."""
    return int(record["image"].split("_")[0])


def pairs_of(text):
    """Return the questions and answers of a text such as "is there a red shape? yes what shape is present? circle"."""
    return re.findall(r"([^?]+\?) (\w+)", text)


def test_conversations_ask_as_often_about_what_is_there_as_about_what_is_not(out):
    records = read(out / "conversations.json")
    assert len(records) == len({record["id"] for record in records}) == 4 * len(TRAIN)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        first, *others = [turn["value"] for turn in turns[::2]]
        start, end = "<image>\n", "\nAnswer the question using a single word or phrase."
        assert first.startswith(start)
        assert first.endswith(end)
        questions = [first.removeprefix(start).removesuffix(end), *others]
        check_balanced(list(zip(questions, [turn["value"] for turn in turns[1::2]], strict=True)), record)


def check_balanced(pairs, record):
    """Check that the pairs are those of the image, some of those of yes or no about what is absent left out."""
    known = TRAIN[number_of(record)][2]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) <= set(known)
    left_out = set(known) - set(pairs)
    assert all(answer in make_data.YES_NO and not make_data.says_there(text, answer) for text, answer in left_out)
    there = [make_data.says_there(*pair) for pair in pairs if pair[1] in make_data.YES_NO]
    assert there.count(False) <= max(1, there.count(True))
    # Left out where there are too many, and only there.
    assert not left_out or there.count(False) == max(1, there.count(True))


def test_captions_say_what_the_questions_say_where_that_is_all(out):
    records = read(out / "captions.json")
    assert len(records) == 4 * len(CAPTIONS)
    for record in records:
        assert [turn["value"] for turn in record["conversations"]] == ["<image>", CAPTIONS[number_of(record)]]


def test_lists_of_names_say_what_the_image_shows(out):
    records = read(out / "names.json")
    assert len(records) == 4 * len(CAPTIONS)
    answers = []
    for record in records:
        words = record["conversations"][1]["value"].split()
        assert set(words[::2]) <= make_data.SHAPES | make_data.COLOURS
        shown = CAPTIONS[number_of(record)].split()
        assert words[1::2] == ["yes" if name in shown else "no" for name in words[::2]]
        answers += words[1::2]
    assert {"yes", "no"} == set(answers)


def test_questions_without_a_template_are_worded_as_the_split_words_them(out):
    wordings = {text for *_, pairs in TRAIN for text, answer in pairs if answer in make_data.YES_NO}
    records = read(out / "questions.json")
    assert {record["id"].split("_")[0] for record in records} == {"drawn", "asked"}
    for record in records:
        pairs = pairs_of(record["conversations"][1]["value"])
        pairs = [(text.strip(), answer) for text, answer in pairs]
        assert pairs
        if record["id"].startswith("asked"):
            check_balanced(pairs, record)
            continue
        assert {text for text, _ in pairs} <= wordings
        for text, answer in pairs:
            (name,) = make_data.names_in(text)
            assert make_data.says_there(text, answer) == (name in CAPTIONS[number_of(record)].split())


def test_every_copy_shows_the_shape_of_its_image_and_no_image_is_of_the_test_split(data, out):
    files = sorted((out / "images").iterdir())
    assert len(files) == 4 * len(TRAIN)
    for file in files:
        number, copy = map(int, file.stem.split("_"))
        image = np.asarray(Image.open(file))
        is_shape = (image == COLOURS[TRAIN[number][0]]).all(axis=2)
        is_background = (image == (240, 245, 250)).all(axis=2)
        assert (is_shape | is_background).all()
        original = np.asarray(Image.open(data / f"train/images/{number}.png"))
        assert is_shape.sum() == (original == COLOURS[TRAIN[number][0]]).all(axis=2).sum()
        assert copy or (image == original).all()


def test_a_moved_shape_is_found_all_over_the_image():
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    image[:40, :40] = 0
    rng = np.random.default_rng(0)
    lefts = [np.flatnonzero((make_data.move_shape(image, rng) == 0).any(axis=(0, 2))).min() for _ in range(200)]
    assert set(lefts) == set(range(25))


def test_new_words_begin_unlike_each_other_and_the_old_ones_as_they_were(out):
    model, tokenizer = llm.make_llm(out)
    old = AutoTokenizer.from_pretrained(llm.TINY_LLM)
    before = AutoModelForCausalLM.from_pretrained(llm.TINY_LLM).get_input_embeddings().weight
    table = model.get_input_embeddings().weight.detach()
    at = {word: tokenizer(word, add_special_tokens=False).input_ids for word in ("rectangle", "circle", "teal", "red")}
    assert [len(ids) for ids in at.values()] == [1, 1, 1, 1]
    words = table[[ids[0] for ids in at.values()]]
    cosines = torch.nn.functional.cosine_similarity(words[:, None], words, dim=-1)
    # Cosines of random vectors of 128 numbers spread by 0.09; those of means of letters are 0.94 or more.
    assert (cosines - torch.eye(4)).abs().max() < 0.4
    assert torch.equal(words[3], before[old("red", add_special_tokens=False).input_ids[0]])


def test_questions_of_the_package_never_contradict_each_other():
    pytest.importorskip("easy_vqa", reason="reads the package: pip install easy-vqa")
    (data,) = make_data.installed()
    questions = make_data.read_questions(data / "train")
    assert (len(questions), sum(map(len, questions.values()))) == (4000, 38575)
    facts = {number: make_data.get_facts(asked) for number, asked in questions.items()}
    for number, asked in questions.items():
        for question, answer in asked:
            named = {*re.findall(r"\w+", f"{question} {answer}")}
            if answer not in make_data.YES_NO:
                assert named & make_data.SHAPES <= {facts[number].shape}
                assert named & make_data.COLOURS <= {facts[number].colour}


def write_environment(directory):
    """Make `directory` this Python's environment, marked as one that nothing must be installed into."""
    directory.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg", "torch_extensions"):
        if (Path(sys.prefix) / name).exists():
            (directory / name).symlink_to(Path(sys.prefix) / name)
    code = f'source "{ROOT}/scripts/lib/env.sh" && stamp_of "{ROOT}/constraints.txt"'
    (directory / ".llava_lite").write_text(subprocess.check_output(["bash", "-c", code], text=True))
    return directory


def run(data, directory, *flags):
    """Run the command in an environment that nothing is installed into; return its directory and its results."""
    out = directory / "out"
    env = os.environ | {"LLAVA_LITE_VENV": str(write_environment(directory / "venv"))}
    command = ["bash", ROOT / "playground/easy_vqa/run.sh", "--out", out, "--data", data, *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, read(out / "eval/results.json")


@pytest.mark.slow
def test_run_trains_both_stages_and_scores_the_test_split(data, tmp_path):
    """One step a stage: the path, not the figure."""
    out, result = run(data, tmp_path, "--steps", "1", "--ranks", "1")
    assert [line.split("\t")[0] for line in (out / "seconds.tsv").read_text().splitlines()] == [
        *("data", "tower", "llm", "stage1", "stage1b", "stage2", "eval")
    ]
    assert (result["benchmark"], result["num_questions"]) == ("easy_vqa", len(TEST[0][2]))
    assert set(result["scores"]) == {"shape", "yes or no"}
    assert read(out / "stage2/config.json")["mm_vision_tower"] == str(out / "tower")


@pytest.mark.slow
def test_the_command_reaches_97_percent_of_the_test_split(tmp_path):
    """The complete command, a quarter of an hour. A model that does not compare gets 82% of yes or no right."""
    pytest.importorskip("easy_vqa", reason="trains on the package: pip install easy-vqa")
    _, result = run(make_data.installed()[0], tmp_path)
    assert result["num_questions"] == 9673
    assert result["score"] >= 97
    assert min(result["scores"].values()) >= 95, result["scores"]
