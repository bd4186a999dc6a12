"""Records that cannot be read: what stands in their place, and what every worker knows of them."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator
from llava_lite.data.dataset import open_dataset
from llava_lite.data.errors import DataError
from llava_lite.data.skipped import LeftOut
from llava_lite.media.preprocess import load_image_processor

PAD = 0
KINDS = {
    "PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}, "GIF": {},
    "BMP": {},
}  # fmt: skip


def noise(side=160):
    """Return an image that does not compress."""
    return Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))


def encoded(kind, image=None):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    (image or noise()).save(file, kind, **KINDS[kind])
    return file.getvalue()


def bomb():
    """Return a small PNG of more pixels than any image that is read."""
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images_of(toy_data, toy_tokenizer, toy_tower_dir, tmp_path, monkeypatch):
    """Return a function: options -> a data set of toy records, its table of what is left out, its image directory."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    processor = load_image_processor(toy_tower_dir("clip"))

    def make(records=None, **options):
        path, images = toy_data(tmp_path / "data", num_records=8, text_only_every=0)
        if records is not None:
            path = tmp_path / "data" / "own.json"
            path.write_text(json.dumps(records(Path(images))))
        dataset, _ = open_dataset(str(path), toy_tokenizer, processor, "v1", images, **options)
        dataset.left_out = LeftOut(len(dataset))
        return dataset, Path(images)

    return make


def assert_is_empty(example, name):
    """Expect the example of one token that is not supervised, and the message that names its record and file."""
    assert (example["labels"] == IGNORE_INDEX).all()
    assert len(example["input_ids"]) == 1
    assert "images" not in example
    assert all(word in example["left_out"]["reason"] for word in name)


BROKEN = {
    **{f"{kind} cut short": lambda kind=kind: encoded(kind)[: len(encoded(kind)) // 2] for kind in KINDS},
    "PNG with a damaged middle": lambda: encoded("PNG")[:20000] + bytes(64) + encoded("PNG")[20064:],
    "too many pixels": bomb,
    "a video": lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + os.urandom(500),
    "a web page": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "nothing": lambda: b"",
    "not there": None,
    "a directory": "directory",
    "not to be read": "forbidden",
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_happens_to_a_file_the_record_gives_an_empty_example(what, images_of):
    dataset, images = images_of()
    path, content = images / "3.png", BROKEN[what]
    if content == "forbidden" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    if callable(content):
        path.write_bytes(content())
    elif content == "forbidden":
        path.chmod(0)
    else:
        path.unlink()
        if content == "directory":
            path.mkdir()
    assert_is_empty(dataset[3], ["'toy_003' (toy.json[3])", str(path)])
    assert dataset[3]["left_out"]["id"] == "toy_003"
    assert "left_out" not in dataset[2]
    # Without a run that takes it, it is an error with the same words.
    dataset.left_out = None
    with pytest.raises(DataError, match=r"record 'toy_003' \(toy\.json\[3\]\).*3\.png"):
        dataset[3]


def test_an_annotation_file_that_is_cut_while_it_is_read(images_of):
    dataset, _ = images_of()
    path = dataset.annotations.files[0].source.path
    size = os.path.getsize(path)
    os.truncate(path, size - 200)
    assert "left_out" not in dataset[0]
    assert_is_empty(dataset[7], ["toy.json", "JSON"])
    assert dataset[7]["left_out"]["position"] == 7


def test_bytes_in_the_record_that_do_not_decode(images_of):
    import base64

    def records(images):
        sound = base64.b64encode(encoded("PNG")).decode()
        rotten = bytearray(base64.b64decode(sound))
        rotten[20000:20064] = bytes(64)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
        values = [sound, base64.b64encode(bytes(rotten)).decode()]
        return [{"id": f"r{k}", "image": value, "conversations": turns} for k, value in enumerate(values)]

    dataset, _ = images_of(records)
    assert "left_out" not in dataset[0]
    assert_is_empty(dataset[1], ["'r1' (own.json[1])", "in the record"])


def test_an_image_processor_that_fails_names_the_record(images_of, monkeypatch):
    dataset, _ = images_of()

    def fail(image, box=None):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(dataset, "pixels", fail)
    assert_is_empty(dataset[2], ["'toy_002' (toy.json[2])", "RuntimeError: no such shape"])


@pytest.mark.parametrize("collator", [DataCollatorForSupervisedDataset(PAD), PackedCollator()])
def test_a_batch_trains_on_its_other_records_as_before(collator, images_of):
    dataset, images = images_of()
    full = collator([dataset[0], dataset[2]])
    (images / "1.png").unlink()
    batch = collator([dataset[0], dataset[1], dataset[2]])
    supervised = batch["labels"][batch["labels"] != IGNORE_INDEX]
    assert supervised.equal(full["labels"][full["labels"] != IGNORE_INDEX])
    assert batch["images"].equal(full["images"])
    assert len(batch["supervised_positions"]) == len(full["supervised_positions"])
    assert [line["id"] for line in batch["left_out"]] == ["toy_001"]
    assert "left_out" not in full
    alone = collator([dataset[1]])
    assert len(alone["supervised_positions"]) == 0
    assert "images" not in alone


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_are_notified_wherever_it_was_found(stays, context, images_of):
    dataset, _ = images_of()
    loader = DataLoader(
        dataset, 4, collate_fn=DataCollatorForSupervisedDataset(PAD), num_workers=2, persistent_workers=stays,
        multiprocessing_context=context,
    )  # fmt: skip

    def epoch(number):
        dataset.left_out.begin(number)
        return [len(batch["supervised_positions"]) for batch in loader]

    first = epoch(0)
    # Another rank could not read record 5 in this epoch, and record 1 only in epoch 3.
    dataset.left_out.add(5, 0)
    dataset.left_out.add(1, 3)
    second, later = epoch(1), epoch(3)
    assert second[0] == first[0]
    assert second[1] < first[1]
    assert later[0] < first[0]
    assert later[1] == second[1]


def test_a_table_without_room_is_full_and_the_earliest_time_counts():
    left_out = LeftOut(2)
    left_out.add(7, 5)
    assert not left_out.has(7, 4)
    left_out.add(7, 2)
    assert left_out.has(7, 2)
    left_out.add(8, 0)
    assert not left_out.has(8)
    assert not left_out.has(7)
    left_out.begin(2)
    assert left_out.has(7)


def test_known_images_are_looked_at_again(images_of, tmp_path):
    dataset, images = images_of()
    options = {"bad_record": "skip", "max_bad_fraction": 1.0}
    kept = shutil.copytree(images, tmp_path / "kept")
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    (images / "3.png").write_bytes(encoded("PNG")[:5000])
    noise(50).save(images / "4.png")
    for _ in range(2):
        again, report = reopen(dataset, images, options)
        assert [bad.id for bad in report.bad] == ["toy_001", "toy_002", "toy_003"]
        assert [50, 50] in again.annotations.image_sizes.tolist()
    shutil.copytree(kept, images, dirs_exist_ok=True)
    assert not reopen(dataset, images, options)[1].bad


def reopen(dataset, images, options):
    """Return the data set of the same files, opened again, and its report."""
    path = dataset.annotations.files[0].source.path
    tokenizer = dataset.encoder.tokenizer
    return open_dataset(path, tokenizer, dataset.image_processor, "v1", str(images), **options)
