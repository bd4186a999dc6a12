"""Answers are read by record, and their images only from where a run keeps them."""

import base64
import io

from PIL import Image

from llava_lite.train.monitor.report.samples import MOST_BYTES, data_url, read_samples


def test_answers_of_a_record_are_in_the_order_of_their_steps(run_dir):
    line = {"id": "a", "prompt": "p", "expected": "x"}
    lines = [line | {"step": 20, "answer": "late"}, line | {"step": 10, "answer": "early"}]
    # A resumed run answers a step again.
    lines += [line | {"step": 20, "answer": "again"}, line | {"id": "b", "step": 10, "answer": "other"}, {"step": 3}]
    first, second = read_samples(run_dir(generations=lines), {})
    assert first == {
        "id": "a", "prompt": "p", "expected": "x", "answers": [(10, "early"), (20, "again")], "images": [],
    }  # fmt: skip
    assert second["answers"] == [(10, "other")]


def test_images_are_read_from_the_directory_of_samples_alone(run_dir, tmp_path):
    directory = run_dir(generations=[{"id": "a", "prompt": "p", "expected": "x", "step": 1, "answer": "y"}])
    (directory / "samples").mkdir()
    Image.new("RGB", (900, 400), "red").save(directory / "samples/0_0.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    names = ["0_0.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg", 3]
    (sample,) = read_samples(directory, {"a": names})
    (url,) = sample["images"]
    head, _, code = url.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (320, 142)


def test_what_is_no_small_image_is_not_shown(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<script>alert(1)</script>")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8" + bytes(MOST_BYTES))
    Image.new("RGB", (9, 9)).save(tmp_path / "c.jpg", "PNG")
    assert [data_url(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")] == [None] * 3
