"""Find the tokenizer's special tokens that are spelled in a text, and keep them as text.

A tokenizer turns `</s>` in a question into the token that ends an answer. To keep it as text, it is put between two
private-use characters before a template renders it, so that its position is known whatever the template does.
"""

import re
from typing import NamedTuple

from llava_lite.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava_lite.conversation.chat_end_tokens import get_pattern
from llava_lite.conversation.tokenizer_facts import remembered

# Image placeholders and the tags around them depend on a record's images; reasoning tags are always tokens.
_KEPT = {DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN}
_KEPT |= {"<think>", "</think>"}
# Unicode's private use area.
_PRIVATE = range(0xE000, 0xF8FF)


def special_words(tokenizer, also=()) -> re.Pattern:
    """Return a pattern for the special tokens of a tokenizer, and for those texts in `also` that are tokens of it.

    It does not match `<image>` and `<think>`.
    """

    def find():
        tokens = tokenizer.added_tokens_decoder.values()
        known = {token.content for token in tokens if token.special or token.content in also}
        return get_pattern({word for word in known if word.strip()} - _KEPT)

    return remembered(tokenizer, ("special", *also), find)


class Fence(NamedTuple):
    """The two characters around a special token that is kept as text."""

    opening: str
    closing: str

    @classmethod
    def around(cls, texts) -> "Fence":
        """Return two private-use characters that none of the texts contains."""
        used = set().union(*texts)
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        return cls(next(free), next(free))

    def put(self, text: str, words: re.Pattern) -> str:
        """Return a text with each match of `words` between the two characters."""
        return words.sub(lambda match: self.opening + match[0] + self.closing, text)

    def take(self, text: str, spans) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the text without the two characters, its `spans` moved accordingly, and the spans of the matches.

        Raises ValueError if the two characters are no longer in pairs.
        """
        found = list(re.finditer(f"[{self.opening}{self.closing}]", text))
        fences = [match[0] for match in found]
        if fences != [self.opening, self.closing] * (len(fences) // 2):
            raise ValueError("the template changes a special token in a text, so it cannot stay text.")
        at = [match.start() - i for i, match in enumerate(found)]

        def moved(place):
            return place - sum(match.start() < place for match in found)

        bare = text.replace(self.opening, "").replace(self.closing, "")
        spans = [(moved(start), moved(end)) for start, end in spans]
        return bare, spans, list(zip(at[::2], at[1::2], strict=True))
