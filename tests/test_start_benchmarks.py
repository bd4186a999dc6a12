"""The benchmarks of generation and of starting up run, and compare like with like; their figures are not tested."""

import json

import pytest
import torch

from benchmarks import generation, start_up
from benchmarks.workload import SIZES


def test_runners_of_generation_say_the_same(tmp_path):
    generation.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert list(results) == ["batch 1", "batch 8"]
    for figures in results.values():
        runners = {generation.OURS, generation.OURS_STATIC, generation.PLAIN, generation.STOCK, generation.STATIC}
        assert set(figures) == runners
        for one in figures.values():
            assert one["equal_tokens"] == 1
            assert {"tokens_per_s", "first_token_s", "step_s", "ratio", "ratio_cpu"} <= set(one)
        assert len(figures[generation.STOCK]["self_range"]) == 2
        assert len(figures[generation.STOCK]["wall_s_each_again"]) == 1


def test_a_runner_that_says_something_else_is_refused():
    runners = generation.build(SIZES["toy"], "cpu", torch.float32)
    torch.nn.init.normal_(runners[generation.OURS][0].lm_head.weight)
    inputs = generation.prompt(SIZES["toy"], 1, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="llava-lite says other tokens than transformers, dynamic cache"):
        generation.measure(runners, inputs, rounds=1, num_tokens=6)


def test_start_up_counts_the_seconds_of_processes(tmp_path):
    start_up.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(results) == set(start_up.QUICK)
    assert all(one["cpu_s"] > 0 for one in results.values())
    assert json.loads((tmp_path / "found.json").read_text())["settings"]["quick"]
