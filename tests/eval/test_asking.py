"""Questions asked in batches, with images as they are stored."""

from bisect import bisect

import numpy as np
import pytest
from PIL import Image
from toy_eval_data import png
from transformers import LlamaConfig

from llava_lite import load, reply
from llava_lite.eval.asking import (
    Generation,
    ask,
    check_fits,
    check_question,
    in_batches,
    max_positions,
    read_images,
)
from llava_lite.eval.questions import Question
from llava_lite.inference import prepare


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


def test_a_question_beyond_the_context_is_named_with_its_tokens(checkpoint):
    model, processor = load(str(checkpoint(conv_template="v1")), device="cpu")
    image, limit = Image.new("RGB", (30, 30)), model.config.max_position_embeddings
    questions = [Question(0, "short"), Question("n7", "What is it? " * limit, (png(3),))]
    said = r"^question 'n7' has [\d,]+ tokens with its images, and the model's context is 2,048\. Shorten"
    with pytest.raises(ValueError, match=said):
        ask(model, processor, questions, [0, 1], Generation(max_new_tokens=2), batch_size=2)

    def num_tokens(number):
        return prepare(processor, ["it " * number], [[image]])[0]["input_ids"].shape[1]

    # The first that does not fit, and the one before.
    number = bisect(range(limit), limit, key=num_tokens)
    assert num_tokens(number - 1) <= limit < num_tokens(number)
    check_fits(model, processor, Question(1, "it " * (number - 1)), [image])
    with pytest.raises(ValueError, match=f"question 1 has {num_tokens(number):,} tokens"):
        check_fits(model, processor, Question(1, "it " * number), [image])


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 100),
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 400),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 20,
            },
            100,
        ),
    ],
)
def test_the_context_is_that_of_the_scaled_positions(rope, limit):
    assert max_positions(LlamaConfig(max_position_embeddings=100, rope_parameters=rope)) == limit


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (Question("s", "a\ud83db"), r"question 's': character 1 of its text is half of a pair, '\\ud83d', which no"),
        (
            Question("i", "<image> or <image>?", ("a",)),
            "question 'i': 2 <image> placeholders in the conv.* but 1 imag",
        ),
        (Question("i", "<image>?"), "question 'i': 1 <image> placeholders in the conversation but 0 images"),
        (Question("i", "<image>?", ("a", "b")), "question 'i': 1 <image> placeholders .* but 2 images"),
    ],
)
def test_a_text_that_cannot_be_asked_is_named(question, says):
    with pytest.raises(ValueError, match=says):
        check_question(question)
    check_question(Question(1, "\U0001f600 <image>?", ("a",)))
    check_question(Question(1, "What?", ("a", "b")))


def test_images_are_paths_bytes_or_made_when_asked(tmp_path):
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    images = read_images(Question(0, "What?", (path, data, lambda: data, lambda: path)))
    assert [(image.size, image.getpixel((0, 0))) for image in images] == [((5, 7), (1, 2, 3))] * 4
