"""Questions asked in batches, with images as they are stored."""

import numpy as np
import pytest
from PIL import Image

from llava_lite import load, reply
from llava_lite.eval.asking import Generation, ask, in_batches, read_images
from llava_lite.eval.questions import Question


def test_batches_have_equally_many_images_and_the_longest_texts_first():
    questions = [
        Question(0, "a"),
        Question(1, "a" * 9, ("i",)),
        Question(2, "a" * 5, ("i",)),
        Question(3, "a" * 7, ("i",)),
        Question(4, "a" * 3),
        Question(5, "not asked", ("i",)),
    ]
    assert [*in_batches(questions, [0, 1, 2, 3, 4], 2)] == [[1, 3], [2], [4, 0]]


def test_images_are_not_turned_by_their_exif(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 24), (200, 0, 0))
    image.paste((0, 0, 200), (0, 0, 20, 24))
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "turned.png", exif=exif)
    model, processor = load(str(checkpoint(conv_template="v1", image_aspect_ratio="pad")), device="cpu")
    for name in ("turned.jpg", "turned.png"):
        stored = np.asarray(Image.open(tmp_path / name))
        question = Question(0, "What is left?", (str(tmp_path / name),))
        (read,) = read_images(question)
        assert read.size == (40, 24)
        answers = {}
        ask(model, processor, [question], [0], Generation(max_new_tokens=6), on_answers=answers.update)
        plain = Image.fromarray(stored)
        assert answers == {0: reply(model, processor, "What is left?", plain, max_new_tokens=6)}
        # `reply` would turn the file itself.
        (features,) = processor.encode([processor.render([("<image>", None)])], [[read]])["pixel_values"]
        (turned,) = processor.encode([processor.render([("<image>", None)])], [[tmp_path / name]])["pixel_values"]
        assert not np.array_equal(features, turned)


def test_an_image_that_cannot_be_read_names_its_question(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"question 'n7': cannot use the image .*a\.jpg"):
        read_images(Question("n7", "What?", (str(tmp_path / "a.jpg"),)))

    def broken():
        raise ValueError("row 3 has no image")

    with pytest.raises(ValueError, match="question 8: row 3 has no image"):
        read_images(Question(8, "What?", (broken,)))


def test_images_are_paths_bytes_or_made_when_asked(tmp_path):
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    images = read_images(Question(0, "What?", (path, data, lambda: data, lambda: path)))
    assert [(image.size, image.getpixel((0, 0))) for image in images] == [((5, 7), (1, 2, 3))] * 4
