"""Batches of examples that a person can read."""

import pytest
import torch

from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator


def example(name, ids, labels, num_images=0, dtype=torch.float32):
    made = {"id": name, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if num_images:
        made["images"] = list(torch.full((num_images, 3, 2, 2), len(ids)).to(dtype))
        made["image_sizes"] = [(2, 2)] * num_images
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
def test_images_of_the_batch_stand_in_order(dtype):
    examples = [
        example("a", [1], [1], 2, dtype),
        example("b", [1, 2], [1, 2]),
        example("c", [1, 2, 3], [1] * 3, 1, dtype),
    ]
    images = DataCollatorForSupervisedDataset(pad_token_id=0)(examples)["images"]
    assert images.dtype == dtype
    assert images[:, 0, 0, 0].tolist() == [1, 1, 3]


@pytest.mark.parametrize("collate", [DataCollatorForSupervisedDataset(pad_token_id=0), PackedCollator()])
def test_images_of_a_batch_with_media_are_a_list_in_order(collate):
    sound = {"audio": (torch.ones(3, 1, 2, 2), 0.5)}
    mixed = example("b", [1, 2], [1, 2]) | {"images": [sound], "image_sizes": [(2, 2)], "in_text": False}
    first = example("a", [1], [1], 1, torch.uint8) | {"in_text": False}
    batch = collate([first, example("t", [3], [3]), mixed])
    assert isinstance(batch["images"], list)
    assert torch.equal(batch["images"][0], first["images"][0])
    assert batch["images"][1] is sound
    assert batch["image_rows"].tolist() == [0, 2]
    assert collate([mixed])["images"] == [sound]


def test_a_missing_pad_token_is_refused():
    with pytest.raises(ValueError, match="has no pad token"):
        DataCollatorForSupervisedDataset(pad_token_id=None)
    with pytest.raises(ValueError, match="unknown padding_side 'middle'"):
        DataCollatorForSupervisedDataset(pad_token_id=0, padding_side="middle")


def test_samples_stand_in_one_row_with_their_own_positions():
    batch = PackedCollator()([*EXAMPLES, example("c", [4, 6], [-100, 6])])
    assert batch["input_ids"].tolist() == [[5, 0, 7, 8, 4, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    # No token stands before a sample's first.
    assert batch["labels"].tolist() == [[-100, 0, 7, -100, -100, 6]]
    assert batch["supervised_positions"].tolist() == [0, 1, 4]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert "attention_mask" not in batch


def test_packs_of_examples_are_one_row_too():
    packs = [[EXAMPLES[0], example("c", [4, 6], [-100, 6], 1)], [EXAMPLES[1]]]
    batch = PackedCollator()(packs)
    flat = PackedCollator()([*packs[0], *packs[1]])
    assert batch["input_ids"].tolist() == [[5, 0, 7, 4, 6, 8]]
    assert batch["sample_ids"] == flat["sample_ids"] == ["a", "c", "b"]
    assert torch.equal(batch["images"], flat["images"])


def test_packing_leaves_the_examples_as_they_were():
    one = example("a", [5, 6], [5, 6])
    PackedCollator()([one])
    assert one["labels"].tolist() == [5, 6]


@pytest.mark.parametrize("crops", [False, True])
def test_images_of_a_packed_row_are_those_of_the_padded_batch(crops):
    examples = [example("a", [1], [1], 2), example("b", [1, 2], [1, 2]), example("c", [1, 2, 3], [1] * 3, 1)]
    if crops:
        examples[0]["images"][0] = torch.zeros(4, 3, 2, 2)
        examples[0]["images"][1] = torch.zeros(5, 3, 2, 2)
        examples[2]["images"][0] = torch.zeros(2, 3, 2, 2)
    packed, padded = PackedCollator()(examples), DataCollatorForSupervisedDataset(pad_token_id=0)(examples)
    assert packed["image_sizes"] == padded["image_sizes"]
    assert [p.shape for p in packed["images"]] == [p.shape for p in padded["images"]]


def test_supervised_positions_are_those_before_a_supervised_token():
    batch = DataCollatorForSupervisedDataset(pad_token_id=0)(EXAMPLES)
    # Batch of three: of the first both, of the second only the token, which nothing precedes.
    assert batch["supervised_positions"].tolist() == [0, 1]
