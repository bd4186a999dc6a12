"""Turn sequences of token ids of unequal length into the arrays of a batch: cut, padded, with masks.

B sequences, T tokens of the longest.
"""

from typing import NamedTuple

import numpy as np
import torch

# What transformers' tokenizers understand.
PADDINGS = (True, "longest", "max_length", False, "do_not_pad")
TRUNCATIONS = (True, "longest_first", "only_first", False, "do_not_truncate")
TENSORS = ("pt", "np", None)
# Tokenizers without a limit have a number of this size.
NO_LIMIT = 10**12


class Sequence(NamedTuple):
    """The ids of a prompt and, for each, whether it belongs to an answer."""

    ids: list[int]
    in_answer: list[bool]


def cut_sequence(sequence: Sequence, max_length: int, placeholder: int) -> Sequence:
    """Return the first `max_length` ids of a sequence; ValueError if an image placeholder would be cut off."""
    ids = sequence.ids
    lost = ids[max_length:].count(placeholder)
    if lost:
        raise ValueError(
            f"max_length {max_length} cuts {lost} of the {ids.count(placeholder)} image placeholders off a prompt of "
            f"{len(ids)} tokens. Give at least {len(ids) - ids[::-1].index(placeholder)}, or fewer images."
        )
    return Sequence(ids[:max_length], sequence.in_answer[:max_length])


def check_choices(padding, truncation, max_length, padding_side, return_tensors) -> None:
    """Raise ValueError for a choice that is unknown, or that would have no effect."""
    for name, value, known in (
        ("padding", padding, PADDINGS),
        ("truncation", truncation, TRUNCATIONS),
        ("padding_side", padding_side, ("left", "right")),
        ("return_tensors", return_tensors, TENSORS),
    ):
        # By type too: 1 equals True.
        if not any(value == one and isinstance(value, (str, bool, type(None))) for one in known):
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(repr, known))}.")
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; expected a number of tokens.")
    if padding != "max_length" and truncation in (False, "do_not_truncate"):
        raise ValueError(
            f"max_length={max_length} alone does nothing: give truncation=True to cut prompts at it, or "
            "padding='max_length' to fill them up to it."
        )


def length_limit(max_length: int | None, tokenizer) -> int | None:
    """Return max_length, or the tokenizer's where it has one."""
    if max_length is not None:
        return max_length
    own = getattr(tokenizer, "model_max_length", None)
    return own if own is not None and own < NO_LIMIT else None


def padded_len(
    sequences: list[Sequence], padding, max_length: int | None = None, multiple_of: int | None = None
) -> int | None:
    """Return how long sequences become: the longest, or `max_length`, rounded up to a multiple; None if they stay."""
    if padding in (False, "do_not_pad"):
        return None
    if padding == "max_length" and max_length is None:
        raise ValueError("padding='max_length' needs max_length=, a number of tokens.")
    longest = max(len(sequence.ids) for sequence in sequences)
    length = longest if padding != "max_length" else max(max_length, longest)
    return length if not multiple_of else -(-length // multiple_of) * multiple_of


def pad_sequences(
    sequences: list[Sequence], pad_token_id: int, padding_side: str, length: int | None
) -> dict[str, list[list[int]]]:
    """Return {"input_ids", "attention_mask", "assistant_masks"} as lists of sequences of `length`, None for any."""
    batch = {"input_ids": [], "attention_mask": [], "assistant_masks": []}
    for sequence in sequences:
        filling = 0 if length is None else length - len(sequence.ids)
        masks = ([1] * len(sequence.ids), [int(one) for one in sequence.in_answer])
        for name, values, pad in zip(batch, (sequence.ids, *masks), (pad_token_id, 0, 0), strict=True):
            filled = [pad] * filling
            batch[name].append([*filled, *values] if padding_side == "left" else [*values, *filled])
    return batch


def as_tensors(batch: dict[str, list[list[int]]], return_tensors: str | None) -> dict:
    """Return lists of sequences as tensors ("pt") or arrays ("np") [B, T], or as they are (None)."""
    if return_tensors is None:
        return batch
    lengths = sorted({len(sequence) for sequence in batch["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"sequences of {lengths} tokens make no tensor without padding; give padding=True, or return_tensors=None."
        )
    make = {
        "pt": lambda sequences: torch.tensor(sequences, dtype=torch.long),
        "np": lambda sequences: np.array(sequences, dtype=np.int64),
    }
    return {name: make[return_tensors](sequences) for name, sequences in batch.items()}
