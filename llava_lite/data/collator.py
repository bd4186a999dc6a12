"""Turn examples into a padded batch."""

from dataclasses import dataclass
from typing import Literal

import torch

from llava_lite.constants import IGNORE_INDEX


def batch_pictures(examples: list[dict]) -> dict:
    """Return {"images", "image_sizes"} of the examples as the model takes them, {} if none has a picture."""
    pictures = [picture for example in examples for picture in example.get("images", ())]
    if not pictures:
        return {}
    sizes = [size for example in examples for size in example.get("image_sizes", ())]
    return {"images": torch.stack(pictures) if pictures[0].dim() == 3 else pictures, "image_sizes": sizes}


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples -> input_ids, labels, attention_mask [B, L], sample_ids, and images and image_sizes if there are any.

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
        return batch | batch_pictures(examples)

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=self.padding_side
        )
