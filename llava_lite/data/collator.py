"""Turn examples into a batch: one padded sequence for each, or all packed into one sequence.

B batch, L tokens, n samples, N images, S supervised positions.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from llava_lite.constants import IGNORE_INDEX


def batch_images(examples: list[dict]) -> dict:
    """Return {"images", "image_sizes"} of the examples for the model, {} if none has an image.

    Examples with cached features have `image_features` instead of images. A batch of text then has an empty
    `image_features`, by which the model knows that the tower runs on no rank. Where images have no place in the ids,
    `image_rows` [N] is the example of each. Where an image is media, {kind: (tensor, weight)}, images are a list.
    """
    name = "image_features" if any("image_features" in example for example in examples) else "images"
    images = [image for example in examples for image in example.get(name, ())]
    if not images:
        return {} if name == "images" else {name: torch.empty(0)}
    sizes = [size for example in examples for size in example.get("image_sizes", ())]
    is_list = any(isinstance(image, dict) for image in images) or images[0].dim() == (4 if name == "images" else 3)
    batch = {name: images if is_list else torch.stack(images), "image_sizes": sizes}
    if any("in_text" in example for example in examples):
        batch["image_rows"] = torch.tensor([i for i, example in enumerate(examples) for _ in example.get(name, ())])
    return batch


def get_left_out(examples: list[dict]) -> dict:
    """Return {"left_out"}: the records of these examples that could not be read; {} if there are none."""
    found = [example["left_out"] for example in examples if "left_out" in example]
    return {"left_out": found} if found else {}


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the flat positions [S] of labels [B, L] whose next token is supervised; a first token never is.

    Computed here, on a worker: the model would have to wait for the device to know their number.
    """
    is_supervised = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))  # [B, L]
    return is_supervised.flatten().nonzero().squeeze(1)


@dataclass
class PackedCollator:
    """Examples, or packs (lists) of them -> one sequence [1, L] without padding: input_ids, labels, position_ids.

    Positions count from 0 in each sample. cu_seq_lens_q and _k, int32 [n + 1], are the start of each sample and the
    end of the last one, max_length_q and _k the longest length: transformers' names, by which attention separates the
    samples. There is no attention_mask: with one, transformers would attend across samples. The label of a sample's
    first token is IGNORE_INDEX, since no token predicts it. supervised_positions, sample_ids and images as in
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
        return batch | batch_images(examples) | get_left_out(examples)


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples -> input_ids, labels, attention_mask [B, L], sample_ids, and images and image_sizes if there are any.

    supervised_positions [S]: the flat positions whose next token is supervised.

    The mask is made from the lengths and not from the ids, so a pad token within a text is kept. Images are in the
    order of their examples, [N, 3, H, W], or a list of [n, 3, H, W] if they are cut into crops, or of [3, H, W] and
    {kind: (tensor, weight)} if some are media, with the (width, height) of each; a batch without images has no key
    `images`.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self):
        """Raise ValueError for a tokenizer without a pad token."""
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
        return batch | batch_images(examples) | get_left_out(examples)

    def _pad(self, sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=value, padding_side=self.padding_side
        )
