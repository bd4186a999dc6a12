"""Batches of examples that a person can read."""

import pytest
import torch

from llava_lite.data.collator import DataCollatorForSupervisedDataset


def example(name, ids, labels, num_pictures=0, dtype=torch.float32):
    made = {"id": name, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if num_pictures:
        made["images"] = list(torch.full((num_pictures, 3, 2, 2), len(ids)).to(dtype))
        made["image_sizes"] = [(2, 2)] * num_pictures
    return made


EXAMPLES = [example("a", [5, 0, 7], [-100, 0, 7]), example("b", [8], [8])]


def test_right_padding_has_its_own_mask():
    batch = DataCollatorForSupervisedDataset(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 0, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 7], [8, -100, -100]]
    # The pad id inside the first text is text.
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["sample_ids"] == ["a", "b"]
    assert "images" not in batch


def test_left_padding_moves_everything():
    batch = DataCollatorForSupervisedDataset(pad_token_id=0, padding_side="left")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 0, 7], [0, 0, 8]]
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, -100, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pictures_of_the_batch_stand_in_order(dtype):
    examples = [
        example("a", [1], [1], 2, dtype),
        example("b", [1, 2], [1, 2]),
        example("c", [1, 2, 3], [1] * 3, 1, dtype),
    ]
    images = DataCollatorForSupervisedDataset(pad_token_id=0)(examples)["images"]
    assert images.dtype == dtype
    assert images[:, 0, 0, 0].tolist() == [1, 1, 3]


def test_a_missing_pad_token_is_refused():
    with pytest.raises(ValueError, match="has no pad token"):
        DataCollatorForSupervisedDataset(pad_token_id=None)
    with pytest.raises(ValueError, match="unknown padding_side 'middle'"):
        DataCollatorForSupervisedDataset(pad_token_id=0, padding_side="middle")
