"""Turn rows of token ids of unequal length into one tensor: cut, padded, with a mask.

B rows, T tokens of the longest.
"""

import torch

# What transformers' tokenizers understand.
PADDINGS = (True, "longest", "max_length", False, "do_not_pad")


def cut_row(row, max_length, placeholder):
    """Return the first `max_length` ids of a row; ValueError if a picture's place would be cut off."""
    lost = row[max_length:].count(placeholder)
    if lost:
        raise ValueError(
            f"max_length {max_length} cuts {lost} of the {row.count(placeholder)} places of pictures off a prompt of "
            f"{len(row)} tokens. Give at least {len(row) - row[::-1].index(placeholder)}, or fewer pictures."
        )
    return row[:max_length]


def padded_len(rows, padding, max_length=None, multiple_of=None):
    """Return how long rows become: the longest, or `max_length`, rounded up to a multiple."""
    if padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}; known: {', '.join(map(repr, PADDINGS))}.")
    lengths = {len(row) for row in rows}
    if padding in (False, "do_not_pad") and len(lengths) > 1:
        raise ValueError(f"rows of {sorted(lengths)} tokens make no tensor without padding; give padding=True.")
    if padding == "max_length" and max_length is None:
        raise ValueError("padding='max_length' needs max_length=, a number of tokens.")
    length = max(lengths) if padding != "max_length" else max(max_length, *lengths)
    return length if not multiple_of else -(-length // multiple_of) * multiple_of


def pad_rows(rows, pad_token_id, padding_side, length):
    """Return {"input_ids", "attention_mask"} [B, T] of rows of unequal length."""
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)  # [B, T]
    attention_mask = torch.zeros_like(input_ids)
    for place, row in enumerate(rows):
        where = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
        input_ids[place, where] = torch.tensor(row, dtype=torch.long)
        attention_mask[place, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
