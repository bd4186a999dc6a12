"""MMBench: LLaVA's prompts, the score over all rotations, and the sheet of its server."""

import base64
import csv

import pytest
from toy_eval_data import load, png, reds, write_table

from llava_lite.eval.benchmarks import get_benchmark
from llava_lite.eval.benchmarks.tsv import is_empty, read_table

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
COLUMNS += ["comment", "split"]
NAMES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}


def line(index, options, answer="A", colour=10, **more):
    """Return a line of the TSV."""
    row = dict.fromkeys(COLUMNS, "") | dict(zip("ABCD", options, strict=False))
    row |= {"index": index, "question": "Which one?", "answer": answer, "split": "dev", "source": "toy"}
    row |= {"category": "count", "l2-category": "coarse", "image": base64.b64encode(png(colour)).decode()}
    return row | more


def write(path, rows):
    """Write the TSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def two_questions():
    """Return two questions of two options, each with its two rotations."""
    return [
        line(7, ["one", "two"], "A"),
        line(1000007, ["two", "one"], "B"),
        line(8, ["red", "blue"], "B", 20, category="colour"),
        line(1000008, ["blue", "red"], "A", 20, category="colour"),
    ]


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("mmbench", "\nAnswer with the option's letter from the given choices directly."),
        ("mmbench_cn", "\n请直接回答选项字母。"),
    ],
)
def test_prompt_is_llavas(tmp_path, name, ending):
    rows = [
        line(0, ["a cat", "a dog"], colour=30, hint='Look at\nthe "tail".'),
        line(1, ["one", "None", "three"]),
        line(2, ["x", "y", "NA"], hint="nan"),
        line(3, ["x", "y", "z", "nan "], hint="None"),
    ]
    write(tmp_path / NAMES[name], rows)
    _, _, questions = load(name, tmp_path)
    assert [question.text for question in questions] == [
        'Look at\nthe "tail".\nWhich one?\nA. a cat\nB. a dog' + ending,
        "Which one?\nA. one" + ending,
        "Which one?\nA. x\nB. y" + ending,
        "Which one?\nA. x\nB. y\nC. z\nD. nan " + ending,
    ]
    # The answer file holds the prompt without the instruction.
    assert questions[1].prompt == "Which one?\nA. one"
    assert dict(questions[0].more) == {"round_id": 0, "options": ["a cat", "a dog"], "option_char": ["A", "B"]}
    assert [question.id for question in questions] == [0, 1, 2, 3]
    assert reds(questions[0]) == [30]


def test_a_question_is_right_if_all_its_rotations_are(tmp_path):
    write(tmp_path / NAMES["mmbench"], two_questions())
    benchmark, options, questions = load("mmbench", tmp_path)
    scores = benchmark.score(questions, ["A", "B.", "red", "B"], options)
    # Question 7: both right. Question 8: "red" names A by its text, B is right; its rotation is wrong too.
    assert scores.main == 50
    assert list(scores.each) == [1, 1, 0, 0]
    assert scores.table == {"questions": 2, "first rotation alone": 50, "coarse": 50, "count": 100, "colour": 0}
    assert scores.notes == ("0 of 4 answers name no letter and are wrong; MMBench's server asks GPT.",)
    assert benchmark.score(questions, ["A", "A", "B", "A"], options).main == 50
    assert benchmark.score(questions, ["A", "A", "B", "?"], options).main == 0
    assert scores.interval == pytest.approx((9.45, 90.55), abs=0.01)


def test_fewer_rotations_are_reported(tmp_path):
    write(tmp_path / NAMES["mmbench"], two_questions())
    benchmark, options, questions = load("mmbench", tmp_path)
    scores = benchmark.score(questions[:3], ["A", "B", "B"], options)
    assert scores.main == 100
    assert scores.notes[1] == "1 of 2 questions lack rotations, so the score is too high."


def test_upload_has_the_columns_of_llavas_converter(tmp_path):
    rows = two_questions()
    rows[0]["question"] = 'Which "one"?\nThe first?'
    write(tmp_path / NAMES["mmbench"], rows)
    benchmark, options, questions = load("mmbench", tmp_path)
    files = benchmark.write(tmp_path / "out", questions, ["A", "B\tb", "", "none"], options)
    with open(files[0], newline="", encoding="utf-8") as file:
        found = list(csv.reader(file, delimiter="\t"))
    assert found[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert found[1] == ["7", 'Which "one"?\nThe first?', "one", "two", "", "", "A", "A", "dev"]
    assert [row[6] for row in found[1:]] == ["A", "B\tb", "", "none"]


def test_upload_as_xlsx_holds_the_same(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    write(tmp_path / NAMES["mmbench"], two_questions())
    benchmark, options, questions = load("mmbench", tmp_path)
    files = benchmark.write(tmp_path / "out", questions, ["A\x07", "B", "=1", "A"], options)
    assert [path.name for path in files] == ["mmbench_dev_upload.tsv", "mmbench_dev_upload.xlsx"]
    sheet = openpyxl.load_workbook(files[1]).active
    rows = list(sheet.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (7, "Which one?", "one", "two", None, None, "A", "A", "dev")
    assert (sheet["G4"].value, sheet["G4"].data_type) == ("=1", "s")


def test_without_openpyxl_the_tsv_is_written_and_the_rest_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    write(tmp_path / NAMES["mmbench"], two_questions())
    benchmark, options, questions = load("mmbench", tmp_path)
    files = benchmark.write(tmp_path, questions, ["A"] * 4, options)
    assert [path.name for path in files] == ["mmbench_dev_upload.tsv"]
    assert capsys.readouterr().out == (
        "mmbench_dev_upload.xlsx is not written: pip install openpyxl and run again, which asks nothing twice.\n"
    )


def test_test_split_is_written_and_not_scored(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in two_questions()]
    write(tmp_path / "mmbench_test_20230712.tsv", rows)
    benchmark, options, questions = load("mmbench", tmp_path, "test")
    scores = benchmark.score(questions, ["A"] * 4, options)
    assert scores.main is None
    assert "opencompass" in scores.notes[0]
    header = benchmark.write(tmp_path, questions, ["A"] * 4, options)[0].read_text().splitlines()[0]
    assert header.split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "split"]


def test_rotation_may_name_the_line_that_has_its_image(tmp_path):
    rows = two_questions()
    rows[3]["image"] = "8"
    write(tmp_path / NAMES["mmbench"], rows)
    _, _, questions = load("mmbench", tmp_path)
    assert [reds(question) for question in questions] == [[10], [10], [20], [20]]


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    rows = two_questions()
    write(tmp_path / "own" / NAMES["mmbench"], rows)
    stored = [
        {key: row[key] for key in COLUMNS if key not in ("l2-category", "comment", "image")}
        | {"L2-category": row["l2-category"], "image": png(10 if row["index"] % 10 == 7 else 20), "E": "nan"}
        for row in rows
    ]
    write_table(tmp_path / "hub" / "en" / "dev-00000-of-00001.parquet", stored)
    _, _, own = load("mmbench", tmp_path / "own")
    benchmark, options, hub = load("mmbench", tmp_path / "hub")
    assert [q._replace(images=(), truth=None) for q in hub] == [q._replace(images=(), truth=None) for q in own]
    assert [reds(question) for question in hub] == [reds(question) for question in own]
    assert benchmark.score(hub, ["A", "B", "B", "A"], options).main == 100


def test_what_is_missing_or_broken_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MMBench needs files .*\n  .*mmbench_dev_20230712.tsv    from https"):
        load("mmbench", tmp_path)
    (tmp_path / NAMES["mmbench"]).write_text("index\tquestion\n1\tx\n")
    with pytest.raises(ValueError, match=r"has the columns index, question; A, B, image is missing"):
        load("mmbench", tmp_path)
    (tmp_path / NAMES["mmbench"]).write_text("index\tquestion\tA\tB\timage\n1\tx\n")
    with pytest.raises(ValueError, match=r"line 2 has 2 cells, the header 5. The file may be cut"):
        load("mmbench", tmp_path)
    write(tmp_path / NAMES["mmbench"], [line(5, ["x", "y"], image="?" * 100)])
    with pytest.raises(ValueError, match=r"question 5: its image is no base64 \(.*\): '\?\?"):
        reds(load("mmbench", tmp_path)[2][0])


def test_chinese_file_may_lie_beside_the_english_one(tmp_path):
    benchmark = get_benchmark("mmbench_cn")
    assert benchmark.find(tmp_path) == tmp_path / "mmbench_cn"
    write(tmp_path / "mmbench" / NAMES["mmbench_cn"], two_questions())
    assert benchmark.find(tmp_path) == tmp_path / "mmbench"
    write(tmp_path / "mmbench_cn" / NAMES["mmbench_cn"], two_questions())
    assert benchmark.find(tmp_path) == tmp_path / "mmbench_cn"
    assert benchmark.find(tmp_path / "mmbench") == tmp_path / "mmbench"


def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "x.tsv").write_text("image\n" + "A" * (limit + 1) + "\n")
    assert len(read_table(tmp_path / "x.tsv", ["image"])[0]["image"]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("cell", "empty"), [("", True), ("None", True), ("NONE", True), ("N/A", True), ("0", False)])
def test_cells_that_pandas_or_llava_takes_for_nothing(cell, empty):
    assert is_empty(cell) == empty
