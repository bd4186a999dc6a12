"""Count special tokens and reasoning in the texts of records, and report them."""

from typing import NamedTuple

import numpy as np


class TextCounts(NamedTuple):
    """Counts in the texts of records; first_*: the name of the first record with one."""

    num_special: int = 0  # special tokens that are spelled in a text
    num_with_special: int = 0  # records that have one
    first_special: str = ""
    num_reasoned: int = 0  # records whose last answer has reasoning
    special_tokens_in_text: str = "token"

    def lines(self) -> list[str]:
        """Return the lines of a report, [] if there are no special tokens."""
        lines = []
        if self.num_special:
            become = (
                "are encoded as text"
                if self.special_tokens_in_text == "text"
                else "become those tokens, as in LLaVA; --special_tokens_in_text text encodes them as text"
            )
            lines.append(
                f"{self.num_special:,} special tokens are spelled in the texts of {self.num_with_special:,} records, "
                f"the first in {self.first_special}; they {become}"
            )
        return lines


def count_texts(annotations, special_tokens_in_text: str = "token") -> TextCounts:
    """Return the counts of annotations, after count_tokens."""
    facts = annotations.token_facts()
    special = np.maximum(facts.num_special, 0)

    def first(column):
        found = np.flatnonzero(column)
        return annotations[int(found[0])].name if len(found) else ""

    return TextCounts(
        num_special=int(special.sum()),
        num_with_special=int((special > 0).sum()),
        first_special=first(special),
        num_reasoned=int((facts.is_reasoned > 0).sum()),
        special_tokens_in_text=special_tokens_in_text,
    )
