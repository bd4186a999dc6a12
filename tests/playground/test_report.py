"""The report of a quickstart: numbers from the stages' own files, and which figures were missed."""

import copy
import json

import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import figure, report
from playground.tiny.systems import SYSTEMS

GOOD = {
    "seconds": 600.0,
    "stages": [
        {"stage": name, "loss": 0.1, "tokens_per_s": 1000.0, "seconds": 100.0, "accuracy": fraction}
        for name, fraction in (("stage1", 0.3), ("stage2", 0.95), ("stage3", 0.96))
    ],
    "accuracy": {
        "with_image": 0.96,
        "blank": 0.16,
        "majority": 0.16,
        "by_kind": {"digit": 0.92, "colour": 0.97, "count": 1.0},
        "blank_by_kind": {"digit": 0.1, "colour": 0.12, "count": 0.25},
        "majority_by_kind": {"digit": 0.1, "colour": 0.125, "count": 0.25},
        "search": 0.6,
        "caption": 0.85,
    },
    "experts": {
        "load": {"0": [0.2, 0.3, 0.25, 0.25], "2": [0.25] * 4},
        "router_moved": {"0": 0.4, "2": 0.3},
        "experts_moved": {"0": [0.1] * 4, "2": [0.1] * 4},
    },
}


def question(kind, answer, output, blank="?"):
    return {"kind": kind, "image": None, "question": kind, "answer": answer, "with_image": output, "blank": blank}


ASKED = [
    question("digit", "1", "1"),
    question("digit", "1", "1"),
    question("digit", "2", "1"),
    question("digit", "3", "3", blank="3"),
    question("colour", "red", "red"),
    question("colour", "blue", "blue"),
    question("count", "one", "one"),
    question("count", "two", "one", blank="two"),
    question("where", "top-left", "top-left"),
    question("colour_of", "red", "blue"),
    question("caption", "red 1 top-left.", "red 1 top-left.", blank=None),
]


def write_stage(directory, with_experts=False):
    directory.mkdir()
    lines = []
    for step in range(1, 21):
        line = {"step": step, "loss": 21.0 - step, "tokens_per_s": 1.0 if step == 1 else 500.0}
        if with_experts:
            line |= {
                "lm_loss": line["loss"] - 0.02,
                "experts": {"0": {"load": [0.5, 0.5]}, "2": {"load": [step / 40, 1 - step / 40]}},
            }
        lines.append(line)
    lines.append({"step": 20, "train_runtime": 3.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "answers.json").write_text(json.dumps({"seconds": 1.0, "records": ASKED}))


@pytest.fixture
def out(tmp_path):
    for name in report.STAGES:
        write_stage(tmp_path / name, with_experts=name == "stage3")
    (tmp_path / "seconds.tsv").write_text("world\t10\nstage1\t20.5\nstage2\t30\nstage3\t40\n")
    return tmp_path


def test_a_stage_is_its_last_losses_and_the_speed_of_all_ranks_without_the_first_step(out):
    seconds = report.read_seconds(out / "seconds.tsv")
    # The last tenth of 20 steps has losses 2 and 1; direct kinds: digit 3 of 4, colour 2 of 2, count 1 of 2.
    expected = {"stage": "stage1", "loss": 1.5, "tokens_per_s": 1000.0, "seconds": 20.5, "accuracy": 0.75}
    assert report.stage_report(out / "stage1", seconds, ranks=2) == pytest.approx(expected)
    assert report.stage_report(out / "stage3", seconds, ranks=2)["loss"] == pytest.approx(1.48)


def test_accuracy_is_reported_by_kind_with_search_and_captions_apart():
    found = report.accuracy_report(ASKED)
    assert found["by_kind"] == {"digit": 0.75, "colour": 1.0, "count": 0.5}
    assert found["blank_by_kind"] == {"digit": 0.25, "colour": 0.0, "count": 0.5}
    assert found["majority_by_kind"] == {"digit": 0.5, "colour": 0.5, "count": 0.5}
    assert found["with_image"] == pytest.approx(0.75)
    assert (found["search"], found["caption"]) == (0.5, 1.0)


def test_expert_load_is_the_mean_of_the_last_steps(out):
    assert report.expert_load(out / "stage3") == {"0": [0.5, 0.5], "2": pytest.approx([0.4875, 0.5125])}


def test_benchmarks_are_reported_with_their_score_or_that_of_each_task(out):
    assert "benchmarks" not in report.make_report(out, 2, 0, SYSTEMS["llava"]._replace(has_experts=False))
    common = {"interval_95": None, "num_questions": 4, "versions": {}}
    pope = {"title": "POPE", "metric": "F1, %", "score": 96.04, "scores": {"random: F1": 97.0}}
    mme = {"title": "MME", "metric": "sum", "score": None, "scores": {"count": 200.0, "count: accuracy": 100.0}}
    for name, found in (("pope", pope), ("mme", mme)):
        (out / "eval" / name).mkdir(parents=True)
        (out / "eval" / name / "results.json").write_text(json.dumps(found | common))
    found = report.make_report(out, 2, 0, SYSTEMS["llava"]._replace(has_experts=False))["benchmarks"]
    assert found["POPE"] == {
        "metric": "F1, %",
        "score": 96.04,
        "interval_95": None,
        "num_questions": 4,
        "scores": {"random: F1": 97.0},
    }
    lines = ["MME (4 questions): count 200.0", "POPE (4 questions): F1, % 96.0"]
    assert report.benchmark_lines(found) == lines
    assert report.table(GOOD | {"benchmarks": found}, [0.1, 0.15, 0.16]).splitlines()[-2:] == lines


def test_a_stage_without_losses_is_named(tmp_path):
    (tmp_path / "stage1").mkdir()
    with pytest.raises(ValueError, match="has stage1 been trained"):
        report.last_lines(tmp_path / "stage1")


def test_a_good_report_misses_nothing():
    assert report.missed_figures(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("accuracy", "with_image"), 0.89, "direct questions 89.0%"),
        (("accuracy", "by_kind", "digit"), 0.79, "digit 79.0%"),
        (("accuracy", "blank_by_kind", "count"), 0.31, "count of a blank image 31.0%"),
        (("accuracy", "majority_by_kind", "colour"), 0.40, "most frequent answer to colour"),
        (("stages", 0, "accuracy"), 0.60, "after stage 1 60.0%"),
        (("experts", "load", "2"), [0.1, 0.3, 0.3, 0.3], "least used expert of layer 2 10.0%"),
        (("experts", "router_moved", "0"), 0.0, "did not move in layers ['0']"),
        (("experts", "experts_moved", "2"), [0.1, 0.0, 0.1, 0.1], "did not move in layers ['2']"),
    ],
)
def test_each_missed_figure_is_named(path, value, words):
    bad = copy.deepcopy(GOOD)
    at = bad
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert any(words in sentence for sentence in report.missed_figures(bad))


def test_moves_are_measured_from_the_upcycled_start(tmp_path, toy_model, monkeypatch):
    import torch

    from llava_lite.model.moe.upcycle import upcycle

    moe = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2}
    now = copy.deepcopy(toy_model())
    upcycle(now, moe, seed=7)
    with torch.no_grad():
        now.moe_layers()[0].gate.weight.mul_(1.5)
        now.moe_layers()[0].experts.down_proj[1].mul_(1.2)
    models = {"dense": copy.deepcopy(toy_model()), "moe": now}
    monkeypatch.setattr(report, "load", lambda directory, **_: (models[directory], None))
    moves = report.expert_moves("dense", "moe", seed=7)
    assert moves["router_moved"] == {"0": pytest.approx(0.5), "2": 0.0}
    # Two weight tensors an expert: gate_up_proj stayed, down_proj went 0.2 of its size.
    assert moves["experts_moved"] == {"0": [0.0, pytest.approx(0.1)], "2": [0.0, 0.0]}


def test_the_image_of_the_report_is_drawn(out):
    Image.new("RGB", (56, 56)).save(out / "a.png")
    asked = [{**record, "image": str(out / "a.png")} for record in ASKED]
    small = {**GOOD, "experts": {"load": report.expert_load(out / "stage3")}}
    figure.draw_report(out, small, asked)
    with Image.open(out / "report.png") as drawn:
        assert min(drawn.size) > 500


def test_the_table_shows_every_stage_and_kind():
    text = report.table(GOOD, [0.1, 0.15, 0.16])
    for words in (
        "stage1",
        "stage2",
        "stage3",
        "96.0%",
        "digit",
        "colour",
        "count",
        "search",
        "60.0%",
        "experts of layer 2",
    ):
        assert words in text


TWO_STAGES = SYSTEMS["imagebind"]
GOOD_TWO = {
    **{key: value for key, value in GOOD.items() if key != "experts"},
    "stages": GOOD["stages"][:2],
    "accuracy": {**GOOD["accuracy"], "sound": 0.7},
}


def test_a_system_of_two_stages_is_reported_without_experts(out):
    image = out / "a.png"
    Image.new("RGB", (56, 56)).save(image)
    # ImageBind's world has no counting and no search, and asks about sounds.
    kinds = ("digit", "colour", "caption")
    asked = [{**record, "image": str(image)} for record in ASKED if record["kind"] in kinds]
    asked += [question("sound", "3", "3", blank=None), question("sound", "4", "7", blank=None)]
    for name in TWO_STAGES.stages:
        (out / name / "answers.json").write_text(json.dumps({"seconds": 1.0, "records": asked}))
    found = report.make_report(out, ranks=1, seed=42, system=TWO_STAGES)
    assert "experts" not in found
    assert [stage["stage"] for stage in found["stages"]] == ["stage1", "stage2"]
    assert found["accuracy"]["by_kind"] == {"digit": 0.75, "colour": 1.0}
    assert found["accuracy"]["sound"] == 0.5
    assert "search" not in found["accuracy"]
    assert "sound" in report.table(found, [0.1, 0.1])
    figure.draw_report(out, found, asked)
    with Image.open(out / "report.png") as drawn:
        assert min(drawn.size) > 500


def test_figures_are_those_of_the_system():
    assert report.missed_figures(GOOD_TWO, TWO_STAGES) == []
    bad = {**GOOD_TWO, "accuracy": {**GOOD_TWO["accuracy"], "with_image": 0.84, "sound": 0.59}}
    assert report.missed_figures(bad, TWO_STAGES) == [
        "direct questions 84.0%, expected 85%",
        "by sound alone 59.0%, expected 60%",
    ]
