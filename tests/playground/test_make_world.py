"""The world on disk: LLaVA's layout, LLaVA's records, and held-out questions that a blank image cannot answer."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import make_world, scene_records, world

PLACES = {"top-left", "top-right", "bottom-left", "bottom-right"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    make_world.make_world(out, scale=0.005)
    return out


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"),
        ("LLaVA-Finetune/llava_v1_5_mix665k.json", "LLaVA-Finetune/data"),
        ("MoE-LLaVA/ft_json/llava_image_tune_.json", "MoE-LLaVA"),
        ("MoE-LLaVA/ft_json/nlp_tune.json", "MoE-LLaVA"),
    ],
)
def test_records_take_turns_and_name_images_that_exist(root, annotations, images):
    records = read(root / annotations)
    assert records
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        num_placeholders = sum(turn["value"].count("<image>") for turn in turns)
        assert num_placeholders == ("image" in record)
        if "image" in record:
            with Image.open(root / images / record["image"]) as image:
                assert (image.size, image.mode) == ((56, 56), "RGB")


def test_the_second_stage_mixes_directories_of_llava_and_conversations_without_an_image(root):
    records = read(root / "LLaVA-Finetune/llava_v1_5_mix665k.json")
    directories = Counter(record.get("image", "text").split("/")[0] for record in records)
    assert set(directories) == {"coco", "gqa", "ocr_vqa", "textvqa", "vg", "text"}
    assert all("image" not in record for record in read(root / "MoE-LLaVA/ft_json/nlp_tune.json"))


def test_a_few_conversations_lose_their_image_and_none_that_describes_it():
    rng = np.random.default_rng(0)
    tiles = world.draw_tiles([3], 1, rng)
    scenes = world.sample_scenes(4000, tiles, rng)
    records = scene_records.conversation_records(scenes, rng, "")
    left = scene_records.hide_some(scenes, records, rng)
    hidden = (left.tile == world.EMPTY).all(axis=1)
    assert (left.tile[~hidden] == scenes.tile[~hidden]).all()
    # 4000 draws, a fifth of them described: three standard deviations of 0.016 are 0.006.
    assert hidden.mean() == pytest.approx(0.016, abs=0.006)
    assert not any("Describe" in json.dumps(records[i]) for i in np.flatnonzero(hidden))


def test_the_same_seed_makes_the_same_world(root, tmp_path):
    make_world.make_world(tmp_path, scale=0.005)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((root / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_no_constant_answer_is_better_than_another(root):
    questions = read(root / "held_out/questions.json")
    fractions = {"digit": 1 / 10, "colour": 1 / 8, "count": 1 / 4, "where": 1 / 4, "colour_of": 1 / 8}
    for kind, expected in fractions.items():
        asked = [q for q in questions if q["kind"] == kind]
        answers = Counter(q["answer"] for q in asked)
        assert {count / len(asked) for count in answers.values()} == {expected}
        for text in {q["question"] for q in asked}:
            same = Counter(q["answer"] for q in asked if q["question"] == text)
            assert len(set(same.values())) == 1
            assert len(same) == round(1 / expected)


def test_searching_questions_are_asked_of_images_with_two_digits_or_more():
    tiles = world.draw_tiles([4], 1, np.random.default_rng(0))
    for kind in ("where", "colour_of"):
        scenes, questions = scene_records.held_out_questions(kind, tiles, np.random.default_rng(1))
        assert len(questions) == len(scenes.digit) == 240
        assert (scenes.digit != world.EMPTY).sum(axis=1).min() >= 2


def test_held_out_images_are_drawn_from_held_out_scans_alone(monkeypatch, tmp_path):
    drawn = []
    draw_tiles = world.draw_tiles

    def remember(folds, variants, rng):
        drawn.append(draw_tiles(folds, variants, rng))
        return drawn[-1]

    monkeypatch.setattr(make_world, "draw_tiles", remember)
    make_world.make_world(tmp_path, scale=0.001)
    train, held_out = (set(tiles.scan) for tiles in drawn)
    assert held_out == set(range(4, 1797, 5))
    assert not train & held_out
