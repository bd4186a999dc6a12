"""Turn scikit-learn's scans of handwritten digits into coloured images and questions about them.

A scene is one index of three arrays: up to four digits, each in a quadrant of its own. Letters: `N` scenes, `M` tiles.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("one", "two", "three", "four")
COLOURS = {
    "red": (225, 45, 45),
    "orange": (245, 140, 20),
    "yellow": (245, 235, 60),
    "green": (50, 170, 60),
    "cyan": (80, 220, 225),
    "blue": (60, 90, 240),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)

TILE = 28
CANVAS = 2 * TILE
EMPTY = -1
NUM_FOLDS = 5
HELD_OUT_FOLD = 4


class Tiles(NamedTuple):
    """Drawn digits, sorted by what they show."""

    alpha: np.ndarray  # [M, TILE, TILE] uint8
    start: np.ndarray  # [11] tiles start[d] to start[d + 1] show digit d
    scan: np.ndarray  # [M] which scan each was drawn from


class Scenes(NamedTuple):
    """Images before they are drawn; EMPTY where a place holds nothing."""

    digit: np.ndarray  # [N, 4]
    colour: np.ndarray  # [N, 4] index into COLOUR_NAMES
    tile: np.ndarray  # [N, 4] index into a Tiles


class Question(NamedTuple):
    """One thing to ask of a scene. kind: a key of DIRECT or SEARCH, "caption" or "text"."""

    kind: str
    text: str
    answer: str


def scans_of_folds(folds):
    """Return the scans i with i % NUM_FOLDS in `folds`: images [S, 8, 8] uint8, digits [S], numbers [S]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    number = np.flatnonzero(np.isin(np.arange(len(scans.target)) % NUM_FOLDS, list(folds)))
    pixels = np.clip(scans.images[number] * (255 / 16), 0, 255).astype(np.uint8)
    return pixels, scans.target[number], number


def training_folds(held_out_fold=HELD_OUT_FOLD):
    """Return the folds to train on. HELD_OUT_FOLD is never among them, whichever fold is asked about."""
    return [fold for fold in range(NUM_FOLDS) if fold not in (held_out_fold, HELD_OUT_FOLD)]


def draw_tile(pixels, rng):
    """Return a scan [8, 8] enlarged, rotated a little and put somewhere in a tile [TILE, TILE]."""
    size = int(rng.integers(22, TILE + 1))
    digit = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    digit = digit.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC)
    tile = Image.new("L", (TILE, TILE))
    tile.paste(digit, tuple(int(x) for x in rng.integers(0, TILE - size + 1, size=2)))
    return np.asarray(tile)


def draw_tiles(folds, variants, rng):
    """Return Tiles with every scan of `folds` drawn `variants` times."""
    pixels, digits, number = scans_of_folds(folds)
    order = np.repeat(np.argsort(digits, kind="stable"), variants)
    bar = tqdm(order, desc="digits", unit="digit", mininterval=1)
    alpha = np.stack([draw_tile(pixels[scan], rng) for scan in bar])
    return Tiles(alpha, np.searchsorted(digits[order], np.arange(11)), number[order])


def pick_tiles(digit, tiles, rng):
    """Return a random tile that shows each digit, EMPTY for EMPTY; any shape."""
    first, last = tiles.start[digit], tiles.start[digit + 1]
    chosen = first + (rng.random(digit.shape) * (last - first)).astype(int)
    return np.where(digit == EMPTY, EMPTY, chosen)


def sample_scenes(num, tiles, rng, counts=(1, 2, 3, 4)):
    """Return `num` random scenes: how many digits is drawn from `counts`; no digit stands in an image twice."""
    count = rng.choice(counts, size=num)  # [N]
    filled = np.argsort(rng.random((num, 4)), axis=1) < count[:, None]  # [N, 4]
    digit = np.argsort(rng.random((num, 10)), axis=1)[:, :4]
    digit = np.where(filled, digit, EMPTY)
    colour = np.where(filled, rng.integers(0, len(COLOURS), (num, 4)), EMPTY)
    return Scenes(digit, colour, pick_tiles(digit, tiles, rng))


def draw(scenes, tiles, rng):
    """Return images [N, CANVAS, CANVAS, 3] uint8: coloured digits on a dark ground of a random shade."""
    filled = scenes.tile != EMPTY  # [N, 4]
    alpha = tiles.alpha[scenes.tile] * filled[..., None, None]  # [N, 4, TILE, TILE]
    alpha = alpha.reshape(-1, 2, 2, TILE, TILE).transpose(0, 1, 3, 2, 4).reshape(-1, CANVAS, CANVAS)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)[scenes.colour]  # [N, 4, 3]
    palette = np.clip(palette + rng.normal(0, 8, palette.shape), 0, 255).reshape(-1, 2, 2, 3)
    ink = palette.repeat(TILE, axis=1).repeat(TILE, axis=2)  # [N, CANVAS, CANVAS, 3]
    ground = rng.uniform(0, 30, (len(alpha), 1, 1, 1))
    cover = (alpha / 255).astype(np.float32)[..., None]
    return (ground + (ink - ground) * cover).astype(np.uint8)


def items(digit, colour, order=range(4)):
    """Return "red 3 top-left" for each filled place of one scene, places in the given order."""
    return [
        f"{COLOUR_NAMES[colour[place]]} {digit[place]} {PLACES[place]}" for place in order if digit[place] != EMPTY
    ]


def caption(digit, colour):
    """Return the sentence that describes all of one scene, in reading order."""
    return ", ".join(items(digit, colour)) + "."


def filled_places(digit):
    """Return the places of one scene that hold a digit."""
    return [place for place in range(4) if digit[place] != EMPTY]


def digit_question(digit, colour, place):
    """Ask which digit stands at a place."""
    return Question("digit", f"Which digit is {PLACES[place]}?", str(digit[place]))


def colour_question(digit, colour, place):
    """Ask for the colour at a place."""
    return Question("colour", f"What colour is the digit {PLACES[place]}?", COLOUR_NAMES[colour[place]])


def count_question(digit, colour, place=None):
    """Ask how many digits there are."""
    return Question("count", "How many digits are there?", COUNTS[len(filled_places(digit)) - 1])


def where_question(digit, colour, place):
    """Ask where the digit of a place stands, by its value."""
    return Question("where", f"Where is the {digit[place]}?", PLACES[place])


def colour_of_question(digit, colour, place):
    """Ask for the colour of the digit of a place, by its value."""
    return Question("colour_of", f"What colour is the {digit[place]}?", COLOUR_NAMES[colour[place]])


def caption_question(digit, colour, place=None):
    """Ask for everything."""
    return Question("caption", "Describe the picture.", caption(digit, colour))


DIRECT = {"digit": digit_question, "colour": colour_question, "count": count_question}
SEARCH = {"where": where_question, "colour_of": colour_of_question}
QUESTIONS = {**DIRECT, **SEARCH, "caption": caption_question}
