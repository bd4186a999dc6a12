"""Scores of a run are found below it, beside it and where a flag says; those of other models are not."""

import json

import pytest

from llava_lite.train.monitor.report.scores import find_scores, is_of


@pytest.fixture
def put(tmp_path):
    """Return a function: place below tmp_path, model -> writes a results.json."""

    def write(place, model, **more):
        path = tmp_path / place / "results.json"
        path.parent.mkdir(parents=True)
        report = {"benchmark": "pope", "metric": "F1", "score": 80.0, "run": {"model": str(model)}} | more
        path.write_text(json.dumps(report))
        return path

    return write


def test_scores_below_and_beside_a_run_are_found(put, tmp_path):
    run = tmp_path / "stage3"
    below, beside = put("stage3/eval/pope", "elsewhere"), put("eval/mme", run, benchmark="mme")
    put("eval/textvqa", tmp_path / "stage2")
    scores, faults = find_scores(run)
    assert [score.path for score in scores] == [beside, below]
    assert faults == []


def test_a_named_directory_gives_the_scores_of_this_run_alone(put, tmp_path):
    run = tmp_path / "stage3"
    run.mkdir()
    mine = put("answers/a", run / "checkpoint-7")
    put("answers/b", tmp_path / "stage2")
    assert [score.path for score in find_scores(run, [tmp_path / "answers"])[0]] == [mine]
    with pytest.raises(
        ValueError, match=r"answers/b' holds no results.json of .*stage3'; what it holds is of .*stage2\.$"
    ):
        find_scores(run, [tmp_path / "answers/b"])
    with pytest.raises(FileNotFoundError, match=r"--scores '.*gone' is no directory"):
        find_scores(run, [tmp_path / "gone"])


def test_files_of_other_programs_are_left_out_and_damaged_ones_are_named(tmp_path):
    run = tmp_path / "run"
    texts = {"a": "{", "b": "[1]", "c": '{"results": {}}', "d": '{"benchmark": "pope", "metric": "F1"}'}
    for name, text in texts.items():
        (run / name).mkdir(parents=True)
        (run / name / "results.json").write_text(text)
    (tmp_path / "eval/results.json").mkdir(parents=True)
    scores, faults = find_scores(run)
    assert scores == []
    assert faults == [
        f"{run}/a/results.json is damaged (no JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)).",
        f"{run}/b/results.json is damaged (it holds a list, expected an object).",
        f'{run}/d/results.json is damaged (it has no "score").',
        f"{tmp_path}/eval/results.json cannot be read (Is a directory).",
    ]
    # One that is named with a flag has a sentence of its own on the page.
    assert find_scores(tmp_path / "other", [run / "a"])[1] == faults[:1] + faults[3:]


@pytest.mark.parametrize(
    ("model", "is_ours"),
    [
        ("RUN", True),
        ("RUN/checkpoint-3", True),
        ("RUN-2", False),
        ("out/stage3", True),
        ("./stage3/", True),
        ("../out/stage3/checkpoint-12", True),
        ("other/stage3", False),
        ("", False),
        ("llava-hf/llava-1.5-7b-hf", False),
    ],
)
def test_a_model_is_known_by_its_path(model, is_ours, tmp_path):
    run = tmp_path / "out" / "stage3"
    run.mkdir(parents=True)
    assert is_of(model.replace("RUN", str(run)), run) == is_ours
