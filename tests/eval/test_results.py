"""Tables and plots of results."""

import pytest

from llava_lite.eval.benchmarks import BENCHMARKS, get_benchmark
from llava_lite.eval.benchmarks.base import Scores
from llava_lite.eval.published import published
from llava_lite.eval.results import show, to_report, to_text, write_report


def test_figures_of_papers_are_those_of_their_column():
    assert [(one.model, one.score) for one in published("sqa")][:2] == [
        ("LLaVA-1.5 7B", 66.8),
        ("LLaVA-1.5 13B", 71.6),
    ]
    assert published("textvqa")[4][:2] == ("MoE-LLaVA StableLM 1.6Bx4", 50.1)
    assert published("mme")[-1][:2] == ("MoE-LLaVA Phi2 2.7Bx4-384", 1431.3)
    # MoE-LLaVA reports no SEED-Bench, and nobody easy-VQA.
    assert len(published("seed")) == 4
    assert published("easy_vqa") == []


@pytest.mark.parametrize(
    ("value", "text"), [(None, "not scored here"), (1234.56, "1,234.6"), (8910, "8,910"), ("x", "x")]
)
def test_figures_are_shown_for_people(value, text):
    assert show(value) == text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_drawn_beside_papers(name, tmp_path):
    benchmark = get_benchmark(name)
    scores = Scores(benchmark.metric, 61.2, (58.0, 64.1), {"part": 12.5, "questions": 3}, notes=("A note.",))
    report = to_report(benchmark, scores, {"model": "checkpoints/mine"}, 200_000)
    assert [path.name for path in write_report(tmp_path, report)] == ["results.json", "results.md", "results.png"]
    text = to_text(report)
    assert "checkpoints/mine, 200,000 questions" in text
    assert "| 95% interval | 58.0 to 64.1 |" in text
    assert "| part | 12.5 |\n| questions | 3 |" in text
    assert text.endswith("\nA note.\n")


def test_figures_of_papers_stand_beside_the_complete_benchmark_alone():
    benchmark = get_benchmark("textvqa")
    scores = Scores(benchmark.metric, 96.2, (93.0, 98.4))
    complete, part = (to_report(benchmark, scores, {"model": "m"}, count) for count in (5000, 160))
    assert (len(complete["published"]), complete["notes"]) == (9, [])
    assert part["published"] == []
    assert part["notes"] == [
        "The figures of others are left out: theirs are of the complete benchmark, at least 5,000 questions, and this "
        "score is of 160."
    ]


def test_an_interval_that_does_not_hold_its_figure_is_drawn(tmp_path):
    benchmark = get_benchmark("easy_vqa")
    report = to_report(benchmark, Scores("accuracy", 50.0, (50.1, 60.0)), {"model": "m"}, 2)
    assert (tmp_path / "results.png") in write_report(tmp_path, report)
