"""ScienceQA: letters, with and without an image."""

import json

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.sqa import ScienceQa

ENDING = "\nAnswer with the option's letter from the given choices directly."


def test_prompts_are_llavas_and_text_only_questions_have_no_image(tmp_path):
    toy.sqa(tmp_path)
    questions = ScienceQa().load(tmp_path, Options())
    assert [question.text for question in questions] == [text + ENDING for text in toy.SQA_TEXTS.values()]
    assert [question.images for question in questions] == [
        (),
        (str(tmp_path / "images/test/11/image.png"),),
        (str(tmp_path / "images/test/12/image.png"),),
    ]
    # The scorer of LLaVA knows by the saved prompt which questions have an image.
    assert questions[0].prompt == questions[0].text
    assert questions[1].prompt == "<image>\n" + questions[1].text
    assert questions[1].truth == (0, 3)


def test_main_figure_is_that_of_the_questions_with_an_image(tmp_path):
    toy.sqa(tmp_path)
    questions = ScienceQa().load(tmp_path, Options())
    scores = ScienceQa().score(questions, ["B", "A. Maryland", "b"], Options())
    assert scores.each == [1, 1, 0]
    assert scores.main == 50
    assert scores.table == pytest.approx({"all": 200 / 3, "text alone": 100, "with image": 50})
    assert scores.interval[0] < 50 < scores.interval[1]
    text_only = ScienceQa().score(questions[:1], ["A"], Options())
    assert (text_only.main, text_only.table) == (None, {"all": 0, "text alone": 0})
    assert text_only.notes == ("No question that was asked has an image.",)


def test_result_file_is_that_of_llavas_program(tmp_path):
    toy.sqa(tmp_path)
    questions = ScienceQa().load(tmp_path, Options())
    (path,) = ScienceQa().write(tmp_path / "out", questions, ["B", "The answer is C.", "E"], Options())
    found = json.loads(path.read_text())
    assert found.pop("acc") == pytest.approx(100 / 3)
    assert found == {
        "correct": 1,
        "count": 3,
        "results": {"4": 1, "11": 2, "12": -1},
        "outputs": {"4": "B", "11": "The answer is C.", "12": "E"},
    }


def test_records_of_another_release_are_refused_both_ways(tmp_path):
    toy.sqa(tmp_path)
    path = tmp_path / "llava_test_CQM-A.json"
    records = json.loads(path.read_text())
    toy.write_json(path, records[:2])
    with pytest.raises(ValueError, match=r"lacks 1 questions of .*pid_splits\.json, such as '12'"):
        ScienceQa().load(tmp_path, Options())
    toy.write_json(path, [*records, {**records[0], "id": "1"}])
    with pytest.raises(ValueError, match=r"question '1' is not in .*pid_splits\.json"):
        ScienceQa().load(tmp_path, Options())


@pytest.mark.parametrize(
    ("was", "now"), [("What is shown?", "Which is warm?"), ("(A) ice (B) fire", "(A) fire (B) ice")]
)
def test_another_question_under_the_same_id_is_refused(was, now, tmp_path):
    toy.sqa(tmp_path)
    path = tmp_path / "llava_test_CQM-A.json"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises(ValueError, match=r"question '1\d' is .*, and .*problems\.json has .* under that id"):
        ScienceQa().load(tmp_path, Options())


def test_options_may_be_written_as_lines(tmp_path):
    toy.sqa(tmp_path)
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(path.read_text().replace("(A) ice (B) fire", "A. ice\\nB. fire"))
    assert "A. ice\nB. fire" in ScienceQa().load(tmp_path, Options())[2].text


def test_table_of_images_alone_is_read_where_it_is_alone(tmp_path):
    import shutil

    toy.sqa_table(tmp_path)
    assert [len(question.images) for question in ScienceQa().load(tmp_path, Options())] == [1, 1, 0]
    shutil.rmtree(tmp_path / "ScienceQA-FULL")
    assert [len(question.images) for question in ScienceQa().load(tmp_path, Options())] == [1, 1]
