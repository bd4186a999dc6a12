"""Random crops of a data set are a function of seed, epoch and record number, in workers that live on as well."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_lite.data.crops import CropDraws
from llava_lite.data.dataset import open_dataset
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import load_image_processor, prepare_image
from llava_lite.media.random_crop import random_box


@pytest.fixture
def opened(tmp_path, write_json, toy_tokenizer, toy_tower_dir):
    """Return (a function: aspect ratio -> data set of four records, its images, its image processor)."""
    rng, images, records = np.random.default_rng(0), [], []
    for k in range(4):
        images.append(Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)))
        images[-1].save(tmp_path / f"{k}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        records.append({"id": str(k), "image": f"{k}.png", "conversations": turns})
    path, processor = write_json(records), load_image_processor(toy_tower_dir("clip"))

    def run(aspect_ratio="random_crop"):
        layout = ImageLayout(16, aspect_ratio=aspect_ratio)
        return open_dataset(path, toy_tokenizer, processor, "v1", str(tmp_path), layout=layout)[0]

    return run, images, processor


def pixels(dataset, **options):
    return [example["images"][0] for batch in DataLoader(dataset, collate_fn=list, **options) for example in batch]


def test_an_example_shows_the_crop_of_its_number_and_epoch(opened):
    run, images, processor = opened
    dataset = run()
    dataset.crop_randomly(7)
    for epoch in (0, 2):
        dataset.begin_epoch(epoch)
        for number, image in enumerate(images):
            box = random_box(image.size, f"7 {epoch} {number} 0")
            expected = prepare_image(image, processor, "random_crop", box=box)
            assert torch.equal(dataset[number]["images"][0], expected)


def test_a_selection_keeps_the_crops_of_its_records(opened):
    dataset = opened[0]()
    dataset.crop_randomly(7)
    expected = dataset[2]["images"][0]
    dataset.annotations = dataset.annotations.select([2, 3])
    assert torch.equal(dataset[0]["images"][0], expected)


def test_workers_that_live_on_see_the_epoch_that_has_begun(opened):
    dataset = opened[0]()
    dataset.crop_randomly(3)
    loader = DataLoader(dataset, collate_fn=list, num_workers=1, persistent_workers=True)
    for epoch in (5, 6):
        dataset.begin_epoch(epoch)
        shown = [example["images"][0] for batch in loader for example in batch]
        alone = opened[0]()
        alone.crop_randomly(3)
        alone.begin_epoch(epoch)
        assert all(torch.equal(*pair) for pair in zip(shown, pixels(alone), strict=True))


def test_without_a_run_and_with_another_ratio_nothing_is_drawn(opened):
    run, images, processor = opened
    square = run("square")
    square.crop_randomly(7)
    square.begin_epoch(1)
    for shown in (pixels(run()), pixels(square)):
        assert all(torch.equal(one, prepare_image(image, processor)) for one, image in zip(shown, images, strict=True))


def test_an_epoch_may_be_named_as_streams_do():
    draws = CropDraws(1)
    draws.begin(4)
    assert draws.box((64, 48), 9, 0) == draws.box((64, 48), 9, 0, epoch=4) != draws.box((64, 48), 9, 0, epoch=3)
