"""easy-VQA as LLaVA's records: what the training split says and no more; the path of run.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from playground.easy_vqa import make_data

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


def test_conversations_ask_all_questions_of_an_image_with_the_prompt_of_the_benchmark(out):
    records = read(out / "conversations.json")
    assert len(records) == len({record["id"] for record in records}) == 2 * len(TRAIN)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        first, *others = [turn["value"] for turn in turns[::2]]
        start, end = "<image>\n", "\nAnswer the question using a single word or phrase."
        assert first.startswith(start)
        assert first.endswith(end)
        questions = [first.removeprefix(start).removesuffix(end), *others]
        pairs = zip(questions, [turn["value"] for turn in turns[1::2]], strict=True)
        assert sorted(pairs) == sorted(TRAIN[number_of(record)][2])


def test_captions_say_what_the_questions_say_where_that_is_all(out):
    records = read(out / "captions.json")
    assert len(records) == 4 * len(CAPTIONS)
    for record in records:
        assert [turn["value"] for turn in record["conversations"]] == ["<image>", CAPTIONS[number_of(record)]]


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


@pytest.mark.slow
def test_run_trains_both_stages_and_scores_the_test_split(data, tmp_path):
    """One step a stage: the path, not the figure."""
    out = tmp_path / "out"
    flags = ["--out", out, "--data", data, "--steps", "1", "--ranks", "1"]
    env = os.environ | {"LLAVA_LITE_VENV": str(write_environment(tmp_path / "venv"))}
    done = subprocess.run(
        ["bash", ROOT / "playground/easy_vqa/run.sh", *flags], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split("\t")[0] for line in (out / "seconds.tsv").read_text().splitlines()] == [
        *("data", "tower", "llm", "stage1", "stage2", "eval")
    ]
    result = read(out / "eval/results.json")
    assert (result["benchmark"], result["num_questions"]) == ("easy_vqa", len(TEST[0][2]))
    assert set(result["scores"]) == {"shape", "yes or no"}
    assert read(out / "stage2/config.json")["mm_vision_tower"] == str(out / "tower")
