"""The benchmarks of generation and start-up run and compare the same work; their figures are not tested."""

import json

import pytest

from benchmarks import generation, start_up
from benchmarks.timing import AGAIN


def test_runners_of_generation_make_the_same_tokens(tmp_path):
    generation.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert list(results) == ["batch 1", "batch 8"]
    for figures in results.values():
        assert set(figures) == set(generation.get_runners("cpu"))
        for one in figures.values():
            assert one["equal_tokens"] == 1
            assert {"tokens_per_s", "first_token_s", "step_s", "ratio", "ratio_cpu"} <= set(one)
        assert len(figures[generation.TRANSFORMERS]["self_range"]) == 2
        assert len(figures[generation.TRANSFORMERS]["wall_s_each_again"]) == 1


def test_runner_that_makes_other_tokens_is_refused():
    def report(ids):
        return [{"ids": ids, "wall_s": 1.0, "cpu_s": 1.0, "first_token_s": 0.5, "first_token_cpu_s": 0.5}]

    reports = {generation.TRANSFORMERS: report([[5, 6]]), generation.OURS: report([[5, 7]])}
    reports[generation.TRANSFORMERS + AGAIN] = reports[generation.TRANSFORMERS]
    with pytest.raises(RuntimeError, match="llava-lite generates other tokens than transformers: 50% are equal"):
        generation.compare(reports, batch_size=1, num_tokens=2, exact=True)
    figures = generation.compare(reports, batch_size=1, num_tokens=2, exact=False)
    assert figures[generation.OURS]["equal_tokens"] == 0.5
    assert figures[generation.OURS]["step_s"] == 0.5


def test_start_up_counts_the_seconds_of_processes(tmp_path):
    start_up.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(results) == set(start_up.QUICK)
    assert all(one["cpu_s"] > 0 for one in results.values())
    assert json.loads((tmp_path / "found.json").read_text())["settings"]["quick"]
