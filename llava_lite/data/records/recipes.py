"""Turn the objects of a file into those of one question and answer, as LLaMA2-Accessory's `preprocess` names it."""

import random
from collections.abc import Callable

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import put_images_first
from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.media import count_images
from llava_lite.data.records.turns import ROLE_OF


def _single_turn(item: dict, where: str) -> dict:
    """Return a record of LLaVA with the first question and answer of its conversation alone.

    Its image is put before the question if it has no placeholder: `llava-lite single-turn` takes them out.
    """
    turns = item.get("conversations")
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: preprocess single_turn_llava reads 'conversations', which are {describe(turns)} here; leave "
            "preprocess out for records of an instruction and its output."
        )
    # A greeting before the first question is dropped, as everywhere.
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    start = int(ROLE_OF.get(str(first.get("from")).lower()) == "gpt")
    pair = turns[start : start + 2]
    if count_images(item) and pair and isinstance(pair[0], dict):
        text = pair[0].get("value")
        if isinstance(text, str) and DEFAULT_IMAGE_TOKEN not in text:
            pair = [pair[0] | {"value": put_images_first(text, 1)}, *pair[1:]]
    return item | {"conversations": pair}


def _one_caption(item: dict, where: str) -> dict:
    """Return a record of an image and its caption; one of several captions is drawn, always the same."""
    captions = item.get("caption")
    if captions is None:
        raise DataError(
            f"{where}: preprocess caption reads 'url' and 'caption'; it has {', '.join(item) or 'nothing'}."
        )
    if isinstance(captions, list) and captions:
        return item | {"caption": random.Random(where).choice(captions)}
    return item


# Names of `preprocess` -> object, where -> object.
RECIPES: dict[str, Callable[[dict, str], dict]] = {"single_turn_llava": _single_turn, "caption": _one_caption}


def apply_recipe(item, recipe: str | None, where: str):
    """Return the object by a key of RECIPES, unchanged for None; DataError if it does not fit."""
    return item if recipe is None or not isinstance(item, dict) else RECIPES[recipe](item, where)
