"""The committed base models: small, opened by transformers, and able to do what the stages build on."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

import playground.tiny
from playground.tiny import imagebind, llm, tower, world

TINY = Path(playground.tiny.__file__).parent


def test_they_take_less_than_twelve_megabytes():
    directories = ("tower", "llm", "alpaca_llm", "imagebind")
    files = [path for directory in directories for path in (TINY / directory).rglob("*")]
    assert 0 < sum(path.stat().st_size for path in files) < 12e6


def test_the_tower_shows_held_out_digits_to_a_linear_probe():
    from transformers import AutoModel

    model = AutoModel.from_pretrained(TINY / "tower").eval()
    rng = np.random.default_rng(0)
    seen, unseen = (world.draw_tiles(folds, 1, rng) for folds in (world.training_folds(), [world.HELD_OUT_FOLD]))
    # Measured 97%; the probe of fewer scenes is a little worse.
    assert tower.probe_accuracy(model, tower.image_processor(), seen, unseen, seed=0, num_scenes=1500) > 0.92


def test_the_encoder_of_images_and_sounds_puts_a_digit_in_one_place():
    from llava_lite.model.encoders.imagebind.opening import open_imagebind

    model = open_imagebind(TINY / "imagebind")
    rng = np.random.default_rng(1)
    seen, unseen = (world.draw_tiles(folds, 1, rng) for folds in (world.training_folds(), [world.HELD_OUT_FOLD]))
    image, sound = imagebind.nearest_digit(model, seen, unseen, seed=1, num=400)
    # Measured 98.5% and 100% of 1,000 images and 250 sounds.
    assert (image > 0.94, sound > 0.94) == (True, True), (image, sound)


def test_the_language_model_answers_from_written_notes():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(TINY / "llm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    right = llm.notes_accuracy(model.eval(), tokenizer, seed=1, num=120)
    assert set(right) == set(llm.NOTE_KINDS)
    assert sum(right.values()) / len(right) > 0.9, right


def test_the_committed_tokenizer_is_the_one_that_make_base_makes():
    from transformers import AutoTokenizer

    from playground.tiny.make_base import world_tokenizer

    output = "USER: red 3 top-left.\nWhat colour is the 3? ASSISTANT: red</s>"
    assert AutoTokenizer.from_pretrained(TINY / "llm")(output).input_ids == world_tokenizer()(output).input_ids
