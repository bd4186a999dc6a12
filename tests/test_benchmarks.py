"""The benchmarks run, say what they promise to say, and compare like with like; their figures are not tested."""

import json

import pytest

from benchmarks.timing import AGAIN, Samples, interleave, machine, summary, write_result


def test_every_round_calls_every_runner_once_and_the_one_again():
    calls = []
    runners = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(runners, rounds=4, warmup=1, again="b")
    assert list(samples) == ["a", "b", "c", "b" + AGAIN]
    assert all(len(one.wall_s) == len(one.cpu_s) == 4 for one in samples.values())
    rounds = [calls[start : start + 4] for start in range(0, 20, 4)]
    assert all(sorted(one) == ["a", "b", "b", "c"] for one in rounds)
    # Whoever comes first in a round finds another machine than who comes last: places rotate.
    assert len({one[0] for one in rounds}) > 1


def test_runner_with_a_clock_of_its_own_is_believed():
    samples = interleave({"wall": lambda: 3.0, "both": lambda: (3.0, 1.5)}, rounds=2, warmup=0)
    assert samples["wall"].wall_s == [3.0, 3.0]
    assert samples["both"].wall_s == [3.0, 3.0]
    assert samples["both"].cpu_s == [1.5, 1.5]


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    # The machine halves its speed after the first round; the rival keeps taking twice as long per unit.
    samples = {
        "base": Samples([2.0, 4.0, 4.0], [1.0, 1.0, 1.0]),
        "fast": Samples([1.0, 2.0, 2.5], [0.5, 0.5, 0.5]),
        "base" + AGAIN: Samples([2.0, 5.0, 4.0], [1.0, 1.0, 1.0]),
    }
    figures = summary(samples, "base", {"base": 100, "fast": 100})
    assert set(figures) == {"base", "fast"}
    assert figures["fast"]["ratio"] == 2.0
    assert figures["fast"]["ratio_range"] == pytest.approx([1.6, 2.0])
    assert figures["fast"]["rate"] == 50
    assert figures["fast"]["ratio_cpu"] == 2.0
    assert figures["base"]["self_range"] == pytest.approx([0.8, 1.0])
    with pytest.raises(ValueError, match="no runner 'slow'; known: base, fast"):
        summary(samples, "slow")


def test_result_names_machine_and_versions(tmp_path):
    report = write_result("toy", {"x": 1}, str(tmp_path / "a" / "toy.json"), num_steps=3)
    assert json.loads((tmp_path / "a" / "toy.json").read_text()) == report
    assert report["settings"] == {"num_steps": 3}
    assert {"torch", "transformers"} <= set(report["machine"]["versions"])
    assert {"date", "processor", "num_cores", "num_threads", "device", "load", "commit"} <= set(machine())
