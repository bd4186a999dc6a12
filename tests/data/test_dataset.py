"""Examples and batches from the oddities of the public data, against the pieces they are made of."""

import base64
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.dataset import LazySupervisedDataset, open_dataset
from llava_lite.data.encode import RecordEncoder, expand_image_tokens
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.records.record import Record
from llava_lite.data.sampler import ModalityLengthGroupedSampler
from llava_lite.media.image import open_image
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import load_image_processor, prepare_image
from llava_lite.media.transform import read_transform

P = 16


@pytest.fixture
def processor(toy_tower_dir):
    return load_image_processor(toy_tower_dir("clip"))


@pytest.fixture
def opened(oddities, toy_tokenizer, processor):
    """The oddities as a dataset of square and of padded images, bad records left out."""
    path, directory, _ = oddities

    def make(**options):
        options = {"max_bad_fraction": 0.2, "bad_record": "skip", "layout": ImageLayout(P)} | options
        return open_dataset(path, toy_tokenizer, processor, "v1", directory, **options)

    return make


def test_placeholders_are_repeated_for_every_feature():
    ids, labels = expand_image_tokens([1, -200, 5, -200, 6], [-100, -100, 5, -100, 6], [3, 1])
    assert ids == [1, -200, -200, -200, 5, -200, 6]
    assert labels == [-100, -100, -100, -100, 5, -100, 6]
    with pytest.raises(ValueError, match="2 placeholders in the tokens but 1 images"):
        expand_image_tokens([-200, -200], [-100, -100], [3])


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_public_oddities_go_through_sampler_dataset_and_collator(opened, toy_tokenizer, aspect_ratio):
    dataset, report = opened(layout=ImageLayout(P, aspect_ratio=aspect_ratio))
    assert len(dataset) == 11
    sampler = ModalityLengthGroupedSampler(dataset.lengths, dataset.has_image, batch_size=3, world_size=1)
    collate = DataCollatorForSupervisedDataset(pad_token_id=toy_tokenizer.unk_token_id)
    seen = []
    for batch in DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=collate):
        num_placeholders = int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        assert num_placeholders == P * len(batch.get("images", ()))
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] <= 2048
        supervised = batch["labels"] != IGNORE_INDEX
        assert supervised.any(dim=1).all()
        assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
        assert not supervised[batch["attention_mask"] == 0].any()
        seen += batch["sample_ids"]
    assert sorted(seen) == sorted(record.id for record in report.annotations)


def test_lengths_known_beforehand_are_those_of_the_examples(opened):
    dataset, report = opened()
    examples = [dataset[i] for i in range(len(dataset))]
    assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in examples]
    assert dataset.has_image.tolist() == ["images" in example for example in examples]
    assert report.num_tokens == sum(len(example["input_ids"]) for example in examples)
    assert max(dataset.lengths) == 2048


def by_id(dataset, name):
    return next(dataset[i] for i in range(len(dataset)) if dataset.annotations[i].id == name)


def test_a_placeholder_without_an_image_is_refused_or_read_as_plain_text(write_json, toy_tokenizer, processor):
    turns = [{"from": "human", "value": "What does the tag <image> mean?"}, {"from": "gpt", "value": "An image."}]
    path = write_json([{"id": "html", "conversations": turns}])
    with pytest.raises(DataError, match=r"1 <image> placeholder in the conversation but no image in record 'html'"):
        open_dataset(path, toy_tokenizer, processor, "v1", layout=ImageLayout(P))
    unchecked = LazySupervisedDataset(open_annotations(path), toy_tokenizer, processor, "v1", layout=ImageLayout(P))
    with pytest.raises(DataError, match="--placeholder_as_text True"):
        unchecked[0]
    options = {"layout": ImageLayout(P), "placeholder_as_text": True}
    dataset, report = open_dataset(path, toy_tokenizer, processor, "v1", **options)
    assert "images" not in dataset[0]
    assert IMAGE_TOKEN_INDEX not in dataset[0]["input_ids"]
    assert "the tag <image> mean" in toy_tokenizer.decode(dataset[0]["input_ids"])
    assert "1 record with an image placeholder and no image, used as plain text" in report.summary()
    assert "record 'html' (train.json[0])" in report.summary().splitlines()[-1]


def test_an_image_inside_a_record_is_the_image_of_its_file(write_json, toy_tokenizer, processor, oddities):
    data = Path(oddities[1], "gqa/images/5.jpg").read_bytes()
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    text = base64.b64encode(data).decode()
    records = [
        {"id": k, "image": image, "conversations": turns}
        for k, image in enumerate(
            ["gqa/images/5.jpg", f"data:image/jpeg;base64,{text}", text, {"bytes": text, "path": None}]
        )
    ]
    options = {"layout": ImageLayout(P)}
    dataset, report = open_dataset(
        write_json(records, "inline.json"), toy_tokenizer, processor, "v1", oddities[1], **options
    )
    for k in range(4):
        assert torch.equal(dataset[k]["images"][0], dataset[0]["images"][0])
        assert dataset[k]["image_sizes"] == [(40, 24)]
    assert report.annotations.image_sizes.tolist() == [[40, 24]] * 4
    keys = [dataset.image_key(record, record.images[0]) for record in dataset.annotations]
    assert len(set(keys)) == 2
    assert keys[1] == keys[2] == keys[3]
    broken = write_json([{**records[0], "image": base64.b64encode(data[:-200]).decode()}], "broken.json")
    with pytest.raises(DataError, match=r"record '0' \(broken.json\[0\]\): cannot use the image 'in the record'"):
        open_dataset(broken, toy_tokenizer, processor, "v1", oddities[1], **options)


def test_a_greeting_from_gpt_changes_nothing(opened):
    dataset, _ = opened()
    one, other = by_id(dataset, "plain"), by_id(dataset, "gpt first")
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_the_image_is_the_one_that_mm_utils_prepares(opened, oddities, processor, aspect_ratio):
    example = by_id(opened(layout=ImageLayout(P, aspect_ratio=aspect_ratio))[0], "ocr png")
    image = open_image(f"{oddities[1]}/ocr_vqa/images/as_png.png")
    assert [pixels.shape for pixels in example["images"]] == [(3, 32, 32)]
    assert torch.equal(example["images"][0], prepare_image(image, processor, aspect_ratio))


@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres"])
def test_bytes_of_an_image_are_its_numbers_before_they_are_normalised(opened, processor, aspect_ratio):
    layout = ImageLayout(P, 4, 32, aspect_ratio, pinpoints=((32, 64), (64, 32)))
    numbers, pixels = (opened(layout=layout, image_resize=resize)[0] for resize in (None, "exact"))
    for i in range(len(numbers)):
        for one, other in zip(numbers[i].get("images", ()), pixels[i].get("images", ()), strict=True):
            assert other.dtype == torch.uint8
            assert torch.equal(read_transform(processor).normalise(other), one)
    collate = DataCollatorForSupervisedDataset(pad_token_id=0)
    images = collate([pixels[0], pixels[1]])["images"]
    assert all(image.dtype == torch.uint8 for image in images)


def test_a_processor_with_another_transform_makes_float32_and_the_reason_is_reported_once(opened, processor, caplog):
    processor.do_rescale = False
    with caplog.at_level("INFO", logger="llava_lite.data.examples"):
        dataset, _ = opened(image_resize="fast")
        images = [dataset[i]["images"][0] for i in range(len(dataset)) if dataset.has_image[i]]
    assert {image.dtype for image in images} == {torch.float32}
    assert [line.getMessage() for line in caplog.records] == [
        "images are normalised by the image processor, as float32 of four times the bytes: do_rescale is off."
    ]


def test_workers_get_paths_not_records(opened):
    dataset, _ = opened()
    tokenizer = pickle.dumps(dataset.encoder.tokenizer)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < len(tokenizer) + 10_000
    assert torch.equal(copy[0]["input_ids"], dataset[0]["input_ids"])


def unchecked(oddities, tokenizer, processor, max_length=2048):
    path, directory, _ = oddities
    annotations = open_annotations(path, directory)
    return LazySupervisedDataset(annotations, tokenizer, processor, "v1", layout=ImageLayout(P), max_length=max_length)


@pytest.mark.parametrize(
    ("position", "max_length", "words"),
    [
        (3, 2048, r"record 'ocr missing' \(train.json\[3\]\): cannot use the image"),
        (7, 2048, r"record 'long question' \(train.json\[7\]\) has no supervised token"),
        (0, 10, r"record 'plain' \(train.json\[0\]\): 1 images lie beyond the maximum of 10"),
    ],
)
def test_an_unchecked_record_that_cannot_be_used_names_itself(
    oddities, toy_tokenizer, processor, position, max_length, words
):
    with pytest.raises(DataError, match=words):
        unchecked(oddities, toy_tokenizer, processor, max_length)[position]


def test_an_image_is_never_cut_in_two(oddities, toy_tokenizer, processor):
    full = unchecked(oddities, toy_tokenizer, processor)[0]
    first = full["input_ids"].tolist().index(IMAGE_TOKEN_INDEX)
    with pytest.raises(DataError, match=r"record 'plain' .* features of an image"):
        unchecked(oddities, toy_tokenizer, processor, first + P - 1)[0]


def test_an_unknown_aspect_ratio_is_refused(oddities, toy_tokenizer, processor):
    path, directory, _ = oddities
    with pytest.raises(ValueError, match="unknown image_aspect_ratio 'round'; known: square, pad"):
        LazySupervisedDataset(
            open_annotations(path, directory),
            toy_tokenizer,
            processor,
            "v1",
            layout=ImageLayout(P, aspect_ratio="round"),
        )


def test_loader_workers_make_the_same_batches(opened, toy_tokenizer):
    dataset, _ = opened()
    collate = DataCollatorForSupervisedDataset(pad_token_id=toy_tokenizer.unk_token_id)
    alone = list(DataLoader(dataset, batch_size=4, collate_fn=collate))
    spread = list(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=2))
    for one, other in zip(alone, spread, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]


def test_system_text_of_a_record_replaces_the_templates_and_unsupervised_answers_carry_no_labels(toy_tokenizer):
    turns = (("human", "How many?"), ("gpt", "three"), ("human", "Which colour?"), ("gpt", "red"))
    record = Record("r", (), turns, system="Hello human", not_supervised=frozenset({1}))
    ids, labels = RecordEncoder(toy_tokenizer, "v1")(record)
    text = toy_tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "Hello human USER: How many? ASSISTANT: three USER: Which colour? ASSISTANT: red"
    supervised = [label for label in labels if label != IGNORE_INDEX]
    assert toy_tokenizer.decode(supervised) == "red</s>"
