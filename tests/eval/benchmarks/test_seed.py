"""SEED-Bench: exact letters, for images and videos and twelve types."""

import json

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.seed import Seed


def test_prompts_are_llavas(tmp_path):
    toy.seed(tmp_path)
    questions = Seed().load(tmp_path, Options())
    assert questions[0].text == (
        "How many towels?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert questions[0].images == (str(tmp_path / "SEED-Bench-image/1_2"),)
    assert [question.id for question in questions] == [101669, 101670, "v1738"]
    assert [question.truth.type for question in questions] == [
        "Instances Counting",
        "Scene Understanding",
        "Action Recognition",
    ]


def test_score_wants_the_bare_letter(tmp_path):
    toy.seed(tmp_path)
    benchmark = Seed()
    questions = benchmark.load(tmp_path, Options())
    scores = benchmark.score(questions, ["A", "D.", "B"], Options())
    assert scores.each == [1, 0, 1]
    assert scores.main == pytest.approx(200 / 3)
    assert scores.table == {
        "image": 50,
        "video": 100,
        "Instances Counting": 100,
        "Scene Understanding": 0,
        "Action Recognition": 100,
    }
    assert scores.notes == ()


def test_questions_that_are_not_asked_are_counted_in_a_note(tmp_path):
    toy.seed(tmp_path)
    path = tmp_path / "llava-seed-bench.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    benchmark = Seed()
    scores = benchmark.score(benchmark.load(tmp_path, Options()), ["A", "D"], Options())
    assert scores.main == 100
    assert scores.notes == (
        "1 questions of SEED-Bench.json are not in llava-seed-bench.jsonl; LLaVA's program counts them as wrong, "
        "which gives 66.7.",
    )
    benchmark = Seed()
    benchmark.load(tmp_path, Options(questions=path.name))
    assert benchmark.num_not_asked == 0


def test_upload_has_the_ids_of_the_benchmark(tmp_path):
    toy.seed(tmp_path)
    toy.seed_table(tmp_path / "table")
    for directory in (tmp_path, tmp_path / "table"):
        questions = Seed().load(directory, Options())
        (path,) = Seed().write(tmp_path / "out", questions, ["A", "D.", "B"], Options())
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"question_id": "101669", "prediction": "A"},
            {"question_id": "101670", "prediction": "D."},
            {"question_id": "v1738", "prediction": "B"},
        ]


def test_a_question_of_another_release_is_refused(tmp_path):
    toy.seed(tmp_path)
    path = tmp_path / "SEED-Bench.json"
    path.write_text(path.read_text().replace('"101670"', '"5"'))
    with pytest.raises(ValueError, match=r"question '101670' is not in .*SEED-Bench\.json"):
        Seed().load(tmp_path, Options())


@pytest.mark.parametrize(
    ("was", "now"), [("Where is it?", "Who is it?"), ("A. One\\nB. Two", "A. Two\\nB. One"), ("D. Four", "D. Five")]
)
def test_another_question_under_the_same_id_is_refused(was, now, tmp_path):
    toy.seed(tmp_path)
    path = tmp_path / "llava-seed-bench.jsonl"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises(ValueError, match=r"question 1016\d+ is .*, and .*SEED-Bench\.json has .* under that id"):
        Seed().load(tmp_path, Options())


def test_images_alone_need_no_frames_of_videos(tmp_path):
    import shutil

    toy.seed(tmp_path)
    shutil.rmtree(tmp_path / "SEED-Bench-video-image")
    toy.write_lines(
        tmp_path / "images.jsonl", map(json.loads, (tmp_path / "llava-seed-bench.jsonl").read_text().splitlines()[:2])
    )
    assert len(Seed().load(tmp_path, Options(questions="images.jsonl"))) == 2
