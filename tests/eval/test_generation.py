"""How answers are generated: LLaVA's way, the benchmark's own in its place, and what a person names before both."""

from types import SimpleNamespace

import pytest

from llava_lite.eval.asking import Generation
from llava_lite.eval.benchmarks import BENCHMARKS, get_benchmark
from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.run import get_generation

NOTHING = {"conv_mode": None, "max_new_tokens": None, "temperature": None, "num_beams": None, "top_p": None}


def made(name, variant=None, **flags):
    """Return the Generation of a benchmark."""
    return get_generation(get_benchmark(name), Options(variant=variant), SimpleNamespace(**NOTHING | flags))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_greedy_by_default(name):
    generation = made(name, next(iter(BENCHMARKS[name].variants), None))
    assert (generation.temperature, generation.num_beams, generation.more) == (0, 1, {})
    assert generation.max_new_tokens == BENCHMARKS[name].max_new_tokens


def test_benchmark_says_how_it_generates_and_flags_come_first():
    assert made("mmmu", "flagperf") == Generation(None, 128, 1.0, 5, 42, "square", {"top_k": 50, "top_p": 1.0})
    changed = made("mmmu", "flagperf", temperature=0.5, num_beams=1, top_p=0.9, max_new_tokens=9, conv_mode="v1")
    assert changed == Generation("v1", 9, 0.5, 1, 42, "square", {"top_k": 50, "top_p": 0.9})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"top_p": 0.5}, "--top-p 0.5: .* with a --temperature above 0"),
        ({"top_p": 5.0, "temperature": 1.0}, "--top-p 5.0: a number above 0, at most 1"),
        ({"temperature": -1.0}, "--temperature -1.0: 0 for greedy"),
        ({"temperature": float("nan")}, "--temperature nan"),
    ],
)
def test_flags_of_sampling_that_do_nothing_are_refused(flags, says):
    with pytest.raises(ValueError, match=says):
        made("pope", None, **flags)


def test_keywords_are_those_of_reply():
    assert made("mmmu", "flagperf").arguments() == {
        "conv_template": None,
        "max_new_tokens": 128,
        "temperature": 1.0,
        "num_beams": 5,
        "top_k": 50,
        "top_p": 1.0,
    }
