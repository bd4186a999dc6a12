"""Turn examples into a batch: a padded row each, or all in one row, one behind the other.

B batch, L tokens, n samples, N pictures, S supervised positions.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from llava_lite.constants import IGNORE_INDEX


def batch_pictures(examples: list[dict]) -> dict:
    """Return {"images", "image_sizes"} of the examples as the model takes them, {} if none has a picture.

    Examples of a run that reads the tower's features from disk have these in place of pictures, `image_features`; a
    batch of text alone then has an empty one, by which the model knows that the tower runs on no rank.
    """
    name = "image_features" if any("image_features" in example for example in examples) else "images"
    pictures = [picture for example in examples for picture in example.get(name, ())]
    if not pictures:
        return {} if name == "images" else {name: torch.empty(0)}
    sizes = [size for example in examples for size in example.get("image_sizes", ())]
    is_crops = pictures[0].dim() == (4 if name == "images" else 3)
    return {name: pictures if is_crops else torch.stack(pictures), "image_sizes": sizes}


def left_out_of(examples: list[dict]) -> dict:
    """Return {"left_out"}: what could not be read of these examples, for the run; {} where all could be."""
    found = [example["left_out"] for example in examples if "left_out" in example]
    return {"left_out": found} if found else {}


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the flat positions [S] of labels [B, L] whose next token is learned; a row's first token never is.

    Found here, on a worker, where the model would have to wait for the device to know how many there are.
    """
    learned = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))  # [B, L]
    return learned.flatten().nonzero().squeeze(1)


@dataclass
class PackedCollator:
    """Examples, or packs (lists) of them -> one row [1, L] without padding: input_ids, labels, position_ids.

    Positions count from 0 in each sample. cu_seq_lens_q and _k, int32 [n + 1], say where samples begin and the last
    one ends, max_length_q and _k are the longest: transformers' names, by which attention keeps samples apart. There
    is no attention_mask: with one, transformers would look across samples. The label of a sample's first token is
    IGNORE_INDEX, since no token stands before it. supervised_positions, sample_ids and pictures as in
    DataCollatorForSupervisedDataset.
    """

    def __call__(self, examples: list) -> dict:
        """Return the batch."""
        examples = [example for some in examples for example in (some if isinstance(some, list) else [some])]
        lengths = [len(example["input_ids"]) for example in examples]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        labels = torch.cat([example["labels"] for example in examples])
        labels[ends[:-1]] = IGNORE_INDEX
        ends, longest = ends.to(torch.int32), max(lengths)
        batch = {
            "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "supervised_positions": supervised_positions(labels[None]),
            "sample_ids": [example["id"] for example in examples],
        }
        return batch | batch_pictures(examples) | left_out_of(examples)


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples -> input_ids, labels, attention_mask [B, L], sample_ids, and images and image_sizes if there are any.

    supervised_positions [S]: the flat positions whose next token is learned.

    The mask says what is padding; it is not derived from the ids, so a pad token that stands in the text is kept.
    Pictures stand one after another in the order of their examples, [N, 3, H, W], or in a list of [n, 3, H, W] where
    they are cut into crops, with the (width, height) of each; a batch without them has no key `images`.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self):
        """Refuse a tokenizer without a pad token while there is someone to tell."""
        if self.pad_token_id is None:
            raise ValueError("pad_token_id is None; the tokenizer has no pad token: set tokenizer.pad_token first.")
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"unknown padding_side {self.padding_side!r}; known: right, left.")

    def __call__(self, examples: list[dict]) -> dict:
        """Return the batch."""
        batch = {
            "input_ids": self._pad([example["input_ids"] for example in examples], self.pad_token_id),
            "labels": self._pad([example["labels"] for example in examples], IGNORE_INDEX),
            "attention_mask": self._pad([torch.ones_like(example["input_ids"]) for example in examples], 0),
            "sample_ids": [example["id"] for example in examples],
        }
        batch["supervised_positions"] = supervised_positions(batch["labels"])
        return batch | batch_pictures(examples) | left_out_of(examples)

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=self.padding_side
        )
