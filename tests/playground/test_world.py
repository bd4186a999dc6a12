"""Scenes, their images and the questions about them."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import world

# A 3 in red top-left and a 7 in blue bottom-right.
DIGIT = np.array([3, world.EMPTY, world.EMPTY, 7])
COLOUR = np.array([world.COLOUR_NAMES.index("red"), world.EMPTY, world.EMPTY, world.COLOUR_NAMES.index("blue")])


@pytest.fixture(scope="module")
def tiles():
    return world.draw_tiles([3], 1, np.random.default_rng(0))


def test_held_out_scans_are_every_fifth_and_never_trained_on():
    held_out = set(world.scans_of_folds([world.HELD_OUT_FOLD])[2])
    assert held_out == set(range(4, 1797, 5))
    for fold in range(5):
        assert not held_out & set(world.scans_of_folds(world.training_folds(fold))[2])
        assert fold not in world.training_folds(fold)


def test_a_tile_shows_the_digit_it_is_filed_under(tiles):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for digit in range(10):
        assert set(target[tiles.scan[tiles.start[digit] : tiles.start[digit + 1]]]) == {digit}


def test_images_hold_one_to_four_different_digits_equally_often(tiles):
    scenes = world.sample_scenes(4000, tiles, np.random.default_rng(1))
    counts = (scenes.digit != world.EMPTY).sum(axis=1)
    # 4000 draws: three standard deviations of a fraction of 0.25 are 0.02.
    assert np.bincount(counts, minlength=5)[1:] / 4000 == pytest.approx([0.25] * 4, abs=0.02)
    for row in scenes.digit:
        shown = row[row != world.EMPTY]
        assert len(set(shown)) == len(shown)


def test_ink_stands_in_its_quadrant_in_its_colour_and_nowhere_else(tiles):
    scenes = world.Scenes(DIGIT[None], COLOUR[None], world.pick_tiles(DIGIT[None], tiles, np.random.default_rng(2)))
    image = world.draw(scenes, tiles, np.random.default_rng(3))[0].astype(int)
    top_left, bottom_right = image[:28, :28], image[28:, 28:]
    for empty in (image[:28, 28:], image[28:, :28]):
        assert len(np.unique(empty.reshape(-1, 3), axis=0)) == 1
    for tile, name in ((top_left, "red"), (bottom_right, "blue")):
        brightest = tile.reshape(-1, 3)[tile.sum(axis=2).argmax()]
        nearest = min(world.COLOURS, key=lambda c: np.abs(brightest - world.COLOURS[c]).sum())
        assert nearest == name


@pytest.mark.parametrize(
    ("kind", "place", "text", "answer"),
    [
        ("digit", 3, "Which digit is bottom-right?", "7"),
        ("colour", 0, "What colour is the digit top-left?", "red"),
        ("count", 0, "How many digits are there?", "two"),
        ("where", 3, "Where is the 7?", "bottom-right"),
        ("colour_of", 0, "What colour is the 3?", "red"),
        ("caption", 0, "Describe the picture.", "red 3 top-left, blue 7 bottom-right."),
    ],
)
def test_questions_are_answered_by_the_scene(kind, place, text, answer):
    assert world.QUESTIONS[kind](DIGIT, COLOUR, place) == world.Question(kind, text, answer)
