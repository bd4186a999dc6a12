"""Turn token ids into pieces of text: runs of supervised tokens, of others, and each image as one block."""

from itertools import groupby
from typing import Literal, NamedTuple

from llava_lite.constants import IMAGE_TOKEN_INDEX

# A character of which a token holds only some bytes.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """Neighbouring tokens of one kind. text: "" for an image; count: tokens."""

    kind: Literal["text", "supervised", "image"]
    text: str
    count: int


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each token where it stands, so that they make up the text together.

    A token that ends inside a character has "", and the next one the character. Decoding a token by itself would lose
    its space before it.
    """
    texts, start, end = [], 0, 0
    for i in range(len(ids)):
        before, text = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start : i + 1])
        if text.endswith(INCOMPLETE) and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, end = end, i + 1
    return texts


def cut_into_pieces(tokenizer, ids: list[int], is_supervised: list[bool], lengths: list[int]) -> list[Piece]:
    """Return the pieces of a sequence. lengths: tokens of each image that stands in it, in order."""
    texts = iter(token_texts(tokenizer, [token for token in ids if token != IMAGE_TOKEN_INDEX]))
    kinds = [
        "image" if token == IMAGE_TOKEN_INDEX else "supervised" if supervised else "text"
        for token, supervised in zip(ids, is_supervised, strict=True)
    ]
    pieces, images = [], iter(lengths)
    for kind, run in groupby(kinds):
        count = len(list(run))
        if kind != "image":
            pieces.append(Piece(kind, "".join(next(texts) for _ in range(count)), count))
            continue
        while count > 0:
            length = next(images)
            pieces.append(Piece(kind, "", length))
            count -= length
    return pieces


def text_pieces(tokenizer, ids: list[int]) -> list[Piece]:
    """Return the pieces of ids of which nothing is supervised, each run of image tokens as one block."""
    lengths = [len(list(run)) for is_image, run in groupby(ids, lambda token: token == IMAGE_TOKEN_INDEX) if is_image]
    return cut_into_pieces(tokenizer, ids, [False] * len(ids), lengths)
