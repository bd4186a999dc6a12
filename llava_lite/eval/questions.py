"""What a benchmark asks: a text with images, and what its answer is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# LLaVA's endings of a question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


class Question(NamedTuple):
    """One question of a benchmark.

    id: of the benchmark; several questions may have the same. text: what the model is asked, without `<image>`, which
    goes before it. images: paths, bytes of files, or functions that return one of these, called when it is asked.
    truth: what its scorer reads. saved: the prompt that the answer file holds, where it is not `text`. more: further
    keys of its line in the answer file.
    """

    id: str | int
    text: str
    images: tuple[str | bytes | Callable[[], Any], ...] = ()
    category: str = "default"
    truth: Any = None
    saved: str | None = None
    more: Mapping[str, Any] = MappingProxyType({})

    @property
    def prompt(self) -> str:
        """Return the prompt of the answer file."""
        return self.text if self.saved is None else self.saved


def chunk_of(count: int, num_chunks: int, index: int) -> range:
    """Return the positions of chunk `index` of `count` questions: ceil(count / num_chunks) each, the last ones fewer.

    As LLaVA's programs cut them, which fail where the last chunks are empty.
    """
    size = math.ceil(count / num_chunks)
    return range(min(index * size, count), min((index + 1) * size, count))
