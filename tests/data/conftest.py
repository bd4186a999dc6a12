"""A small data set with the oddities of the public ones, and an index directory of its own for every test."""

import json

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def index_directory(tmp_path_factory, monkeypatch):
    """Keep the indexes of a test away from the user's and from those of other tests."""
    directory = tmp_path_factory.mktemp("index")
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(directory))
    return directory


def record(record_id, *texts, image=None, **more):
    """Return a LLaVA record whose turns alternate, human first."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": record_id, "conversations": turns} | ({"image": image} if image else {}) | more


def write_image(path, size=(40, 24), colour=(200, 30, 30), **options):
    """Save an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def write_json(tmp_path):
    """Return a function: records -> path of a JSON file that holds them."""

    def write(records, name="train.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records, indent=2))
        return str(path)

    return write


@pytest.fixture
def oddities(tmp_path, write_json):
    """Return (json path, image directory, ids that cannot be used) of 13 records as the public data sets have them."""
    images = tmp_path / "images"
    for name in ("coco/train2017/1.jpg", "vg/VG_100K/2.jpg", "gqa/images/5.jpg", "textvqa/train_images/9.jpg"):
        write_image(images / name)
    write_image(images / "ocr_vqa/images/as_png.png", (24, 40))
    write_image(images / "ocr_vqa/images/as_gif.gif")
    # A png under the name of a jpg.
    write_image(images / "coco/train2017/png_inside.jpg", format="PNG")
    say_first = {"from": "gpt", "value": "How can I help?"}
    first_from_gpt = record("gpt first", "<image>\nWhat colour is it?", "Red.", image="coco/train2017/1.jpg")
    first_from_gpt["conversations"].insert(0, say_first)
    records = [
        record("plain", "<image>\nWhat colour is it?", "Red.", image="coco/train2017/1.jpg"),
        first_from_gpt,
        record(33, "What does the tag <picture> mean in HTML?", "Several files of one image."),
        record("ocr missing", "<image>\nWho wrote this?", "Nobody.", image="ocr_vqa/images/missing.jpg"),
        record("ocr png", "<image>\nWho wrote this?", "Ann.", image="ocr_vqa/images/as_png.jpg"),
        record("ocr gif", "<image>\nWho wrote this?", "Bob.", image="ocr_vqa/images/as_gif.jpg"),
        record("png for jpg", "What is it?\n<image>", "Red.", image="coco/train2017/png_inside.jpg"),
        record("long question", "why? " * 2100, "Because."),
        record("long answer", "Count.", "and one " * 2100),
        record("end of text", "<image>\nHow?", "So.", "And?", "", "Then?", image="gqa/images/5.jpg"),
        record("sharegpt", "Say </s> and USER: twice.", "</s> USER: USER:", "Thanks.", "ASSISTANT: Welcome."),
        record("textvqa", "<image>\nRead.", "red", image=["textvqa/train_images/9.jpg"], model="x", score=None),
        record("vg", "<image>\nWhere?\nAnswer with a box.", "[0.1, 0.2]", image="vg/VG_100K/2.jpg"),
    ]
    return write_json(records), str(images), ["ocr missing", "long question"]
