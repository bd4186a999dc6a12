"""Answers are read by record, and their images only from where a run keeps them."""

import base64
import io

from PIL import Image

from llava_lite.train.monitor.report.files import RunFiles
from llava_lite.train.monitor.report.samples import MOST_BYTES, read_image, read_samples


def test_answers_of_a_record_are_in_the_order_of_their_steps(run_dir):
    line = {"id": "a", "prompt": "p", "expected": "x"}
    lines = [line | {"step": 20, "answer": "late"}, line | {"step": 10, "answer": "early"}]
    # A resumed run answers a step again.
    lines += [line | {"step": 20, "answer": "again"}, line | {"id": "b", "step": 10, "answer": "other"}, {"step": 3}]
    first, second = read_samples(RunFiles(run_dir(generations=lines)), {})
    assert first == {
        "id": "a", "prompt": "p", "expected": "x", "answers": [(10, "early"), (20, "again")], "images": [],
        "lost": [],
    }  # fmt: skip
    assert second["answers"] == [(10, "other")]


def test_images_are_read_from_the_directory_of_samples_alone(run_dir, tmp_path):
    directory = run_dir(generations=[{"id": "a", "prompt": "p", "expected": "x", "step": 1, "answer": "y"}])
    (directory / "samples").mkdir()
    Image.new("RGB", (900, 400), "red").save(directory / "samples/0_0.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    names = ["0_0.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg", 3]
    (sample,) = read_samples(RunFiles(directory), {"a": names})
    (url,) = sample["images"]
    head, _, code = url.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (320, 142)
    assert sample["lost"] == [f"samples/{name} is missing." for name in ("secret.jpg", "secret.jpg", "gone.jpg", "3")]


def test_an_image_that_is_not_shown_says_why(tmp_path):
    samples = tmp_path / "samples"
    (samples / "e.jpg").mkdir(parents=True)
    (samples / "a.jpg").write_bytes(b"<script>alert(1)</script>")
    (samples / "b.jpg").write_bytes(b"\xff\xd8" + bytes(MOST_BYTES))
    Image.new("RGB", (9, 9)).save(samples / "c.jpg", "PNG")
    Image.effect_noise((99, 99), 50).save(samples / "d.jpg")
    whole = (samples / "d.jpg").read_bytes()
    (samples / "d.jpg").write_bytes(whole[: len(whole) // 2])
    found = [read_image(tmp_path, f"{name}.jpg") for name in "abcdef"]
    assert [url for url, _ in found] == [None] * 6
    faults = [fault for _, fault in found]
    assert faults[0] == "samples/a.jpg is damaged (no JPEG)."
    assert faults[1] == "samples/b.jpg is not shown: it has 262,146 bytes, at most 262,144 are."
    assert faults[2] == "samples/c.jpg is damaged (no JPEG)."
    assert faults[3].startswith("samples/d.jpg is damaged (image file is truncated")
    assert faults[4] == "samples/e.jpg cannot be read (Is a directory)."
    assert faults[5] == "samples/f.jpg is missing."
