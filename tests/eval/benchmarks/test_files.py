"""Files of benchmarks: broken ones are named, and images of tables are read when they are asked for."""

from pathlib import Path

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.files import has_tables, read_json, read_lines, read_questions, shared_images
from llava_lite.eval.benchmarks.pope import Pope


def test_broken_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is no JSON file: Expecting"):
        read_json(path)
    path.write_text('{"question_id": 1, "text": "What?"}\n\n{"question_id": 2')
    with pytest.raises(ValueError, match=r"a\.json, line 3 is no JSON object"):
        read_lines(path)
    path.write_text('{"question_id": 1, "words": "What?"}\n')
    with pytest.raises(ValueError, match=r"line 1 holds the keys question_id, words; expected question_id, text"):
        list(read_questions(path, tmp_path))
    path.write_text('"What?"\n')
    with pytest.raises(ValueError, match=r"line 1 holds a str; expected an object"):
        read_lines(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"text": "What?"}, r"line 1 holds the keys question_id, text; expected question_id, text, image"),
        ({"text": "What?", "image": ""}, r"question 1 has the text 'What\?' and the image ''"),
        ({"text": None, "image": "a.png"}, r"question 1 has the text None and the image 'a\.png'"),
    ],
)
def test_lines_of_llava_have_a_text_and_an_image(line, says, tmp_path):
    toy.write_lines(tmp_path / "q.jsonl", [{"question_id": 1, **line}])
    with pytest.raises(ValueError, match=says):
        list(read_questions(tmp_path / "q.jsonl", tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    line = '{"question_id": 1, "text": "What?", "image": "a.png"}\r\n'
    (tmp_path / "q.jsonl").write_bytes(line.encode("utf-8-sig"))
    ((_, question),) = read_questions(tmp_path / "q.jsonl", tmp_path)
    assert (question.text, question.category) == ("What?", "default")


def test_images_of_a_table_are_read_when_they_are_called():
    rows = [{"image": {"bytes": b"a", "path": None}}, {"image": {"bytes": None, "path": "b"}}, {"image": None}]
    rows += [{"image": [{"bytes": bytes([n]), "path": None} for n in range(5)]}, {"image": []}]
    image = shared_images(rows, "image", "name")
    assert [image(0, {})(), image(1, {})(), image(3, {})()] == [b"a", "b", b"\x02"]
    # The key's value is that of row 0, whose image is read already.
    image = shared_images(rows, "image", "name")
    assert image(0, {"name": "x"}) is image(1, {"name": "x"})
    for empty in (2, 4):
        with pytest.raises(ValueError, match=f"row {empty} has no image in the column 'image'"):
            image(empty, {})()


def test_directory_of_a_benchmark_is_found_in_the_one_of_all_or_named(tmp_path):
    pope = Pope()
    # What is missing is listed where LLaVA has it.
    assert pope.find(tmp_path) == tmp_path / "pope"
    toy.pope(tmp_path / "pope")
    assert pope.find(tmp_path) == pope.find(tmp_path / "pope") == tmp_path / "pope"
    toy.pope_table(tmp_path / "hub")
    assert pope.find(tmp_path / "hub") == tmp_path / "hub"
    assert has_tables(tmp_path / "hub")
    assert not has_tables(tmp_path)
    assert pope.find(Path("/nowhere")) == Path("/nowhere/pope")
