"""Read the first batches of a run from its own loader, and keep what a page shows of them.

B batch, L tokens of a batch, n records, H, W pixels.
"""

from itertools import islice
from typing import NamedTuple

import torch

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.data.encode import expand_image_tokens
from llava_lite.train.preview.pixels import ShownImage, show_image
from llava_lite.train.preview.tokens import Piece, cut_into_pieces, text_pieces


class ShownRecord(NamedTuple):
    """A record in a batch. place: its position in the file; num_cut: tokens behind the end of the sequence.

    problem: why it could not be read, None if it could.
    """

    id: str
    file: str
    place: int
    num_tokens: int
    num_image_tokens: int
    num_supervised: int
    num_cut: int
    pieces: list[Piece]
    cut: list[Piece]
    images: list[ShownImage]
    problem: str | None


class ShownBatch(NamedTuple):
    """A micro-batch: its records, the shape of its ids, and its counts of tokens."""

    records: list[ShownRecord]
    shape: tuple[int, int]
    num_tokens: int  # without padding
    num_padding: int
    num_image_tokens: int
    num_supervised: int


class Noted:
    """A data set that notes which records were read, in order; else as the data set itself."""

    def __init__(self, dataset):
        self.dataset, self.read = dataset, []

    def __getattr__(self, name):
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        """Return an example, or those of a pack, as the data set does."""
        found = self.dataset[i]
        numbers, examples = (i, found) if isinstance(i, tuple) else ((i,), [found])
        self.read += zip(numbers, examples, strict=True)
        return found


def read_batches(run, train_set, eval_set, count: int) -> tuple[list[ShownBatch], list[dict]]:
    """Return up to `count` batches of the first epoch, and the lines of the records that could not be read.

    run: a DryRun, inside the context of its `start`.
    """
    noted = Noted(train_set)
    # They would be read before the first batch.
    run.data_args.num_eval_generations = 0
    loader = run.build_trainer(noted, eval_set).get_train_dataloader()
    shown, problems, position = [], [], 0
    for batch in islice(loader, count):
        num_records = len(batch["sample_ids"])
        examples = noted.read[position : position + num_records]
        position += num_records
        shown.append(_show_batch(run, train_set, batch, examples))
        problems += batch.get("left_out", [])
    return shown, problems


def _show_batch(run, dataset, batch: dict, examples: list) -> ShownBatch:
    ids, labels = batch["input_ids"], batch["labels"]
    lengths = [len(example["input_ids"]) for _, example in examples]
    is_padded = "attention_mask" in batch
    if is_padded:
        rows = [(ids[k, :length], labels[k, :length]) for k, length in enumerate(lengths)]
    else:
        rows = list(zip(ids[0].split(lengths), labels[0].split(lengths), strict=True))
    images = iter(batch.get("images", ()))
    records = [
        _show_record(run, dataset, i, example, *row, [next(images) for _ in example.get("images", ())])
        for (i, example), row in zip(examples, rows, strict=True)
    ]
    return ShownBatch(
        records,
        tuple(ids.shape),
        sum(lengths),
        ids.numel() - sum(lengths),
        int((ids == IMAGE_TOKEN_INDEX).sum()),
        len(batch["supervised_positions"]),
    )


def _show_record(run, dataset, i: int, example: dict, ids: torch.Tensor, labels: torch.Tensor, images) -> ShownRecord:
    file, place = dataset.annotations.place(i)
    layout, sizes = dataset.layout, example.get("image_sizes", [])
    lengths = [layout.num_tokens(size) for size in sizes]
    is_supervised = labels != IGNORE_INDEX
    # No token predicts the first one.
    is_supervised[0] = False
    problem = example["left_out"]["reason"] if "left_out" in example else None
    cut = [] if problem else _cut_ids(dataset, i, sizes, len(ids))
    return ShownRecord(
        str(example["id"]),
        file.source.path,
        place,
        len(ids),
        int((ids == IMAGE_TOKEN_INDEX).sum()),
        int(is_supervised.sum()),
        len(cut),
        cut_into_pieces(run.tokenizer, ids.tolist(), is_supervised.tolist(), lengths if layout.in_text else []),
        text_pieces(run.tokenizer, cut),
        [show_image(pixels, size, dataset) for pixels, size in zip(images, sizes, strict=True)],
        problem,
    )


def _cut_ids(dataset, i: int, sizes, num_kept: int) -> list[int]:
    """Return the ids of a record that are truncated."""
    ids, labels = dataset.encoder(dataset.annotations[i])
    lengths = [dataset.layout.num_tokens(size) for size in sizes] if dataset.encoder.injection == "tokens" else []
    return expand_image_tokens(ids, labels, lengths)[0][num_kept:]
