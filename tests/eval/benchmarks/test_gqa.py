"""GQA: exact words, by type of question."""

import json
import shutil

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.gqa import Gqa


def test_prompts_are_llavas(tmp_path):
    toy.gqa(tmp_path)
    questions = Gqa().load(tmp_path, Options())
    assert questions[0].text == "Is it dark?\nAnswer the question using a single word or phrase."
    assert questions[0].id == "201307251"
    assert questions[0].images == (str(tmp_path / "data/images/n161313.jpg"),)
    assert questions[0].truth == ("no", "verify", "global")


def test_score_is_the_share_of_exact_words(tmp_path):
    toy.gqa(tmp_path)
    questions = Gqa().load(tmp_path, Options())
    scores = Gqa().score(questions, ["No.", "red", "a man"], Options())
    assert scores.each == [1, 1, 0]
    assert scores.main == pytest.approx(200 / 3)
    assert scores.table == {
        "binary": 100,
        "open": 50,
        "structural: query": 50,
        "structural: verify": 100,
        "semantic: attr": 100,
        "semantic: global": 100,
        "semantic: rel": 0,
    }


def test_file_for_the_official_program_has_llavas_form(tmp_path):
    toy.gqa(tmp_path)
    questions = Gqa().load(tmp_path, Options())
    (path,) = Gqa().write(tmp_path / "out", questions, ["No.", "Red", "man"], Options())
    assert path.name == "testdev_balanced_predictions.json"
    assert json.loads(path.read_text()) == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "20116", "prediction": "red"},
        {"questionId": "20117", "prediction": "man"},
    ]


def test_questions_of_another_release_are_refused_both_ways(tmp_path):
    toy.gqa(tmp_path)
    path = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"20117"', '"9"'))
    with pytest.raises(ValueError, match=r"question '9' is not in .*testdev_balanced_questions\.json"):
        Gqa().load(tmp_path, Options())
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"lacks 1 questions of .*such as '20117'.* --questions"):
        Gqa().load(tmp_path, Options())
    # Who names a shorter file wants it.
    assert len(Gqa().load(tmp_path, Options(questions=path.name))) == 2


@pytest.mark.parametrize(("was", "now"), [("What color is the car?", "How old is it?"), ("n161313.jpg", "n2.jpg")])
def test_another_question_under_the_same_id_is_refused(was, now, tmp_path):
    toy.gqa(tmp_path)
    path = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace(was, now))
    says = rf"question '20\d+' is .*{now.replace('?', '.')}.*, and .*questions\.json has .* under that id"
    with pytest.raises(ValueError, match=says):
        Gqa().load(tmp_path, Options())
    # Files of one release differ in spaces.
    path.write_text(whole.replace("What color is the car?", "what color  is the car ?"))
    assert len(Gqa().load(tmp_path, Options())) == 3


def test_questions_lie_where_the_archive_is_unpacked(tmp_path):
    toy.gqa(tmp_path)
    expected = Gqa().load(tmp_path, Options())
    (tmp_path / "data/questions1.2").mkdir()
    shutil.move(tmp_path / "data/testdev_balanced_questions.json", tmp_path / "data/questions1.2")
    assert Gqa().load(tmp_path, Options()) == expected


def test_a_question_whose_image_is_not_in_the_table_is_refused(tmp_path):
    toy.gqa_table(tmp_path)
    shutil.rmtree(tmp_path / "testdev_balanced_images")
    photos = [{"id": "n2", "image": toy.drawn("n2.jpg")}]
    toy.write_table(tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", photos)
    with pytest.raises(ValueError, match=r"question 'n161313' is not in .*testdev_balanced_images"):
        Gqa().load(tmp_path, Options())
