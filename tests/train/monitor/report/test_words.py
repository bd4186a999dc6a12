"""Numbers and dates as a person reads them."""

import pytest

from llava_lite.train.monitor.report.words import big, clock, count, logged, number, short, span, time_line, with_flags


@pytest.mark.parametrize(
    ("value", "words"),
    [(999_999, "999,999"), (1_500_000, "1.5 million"), (7.06e9, "7.06 billion"), (2e12, "2 trillion"), (0, "0")],
)
def test_large_numbers_are_short(value, words):
    assert big(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1500, "1,500"),
        (20_000, "20k"),
        (2_500_000, "2.5M"),
        (0.002, "0.002"),
        (2e-5, "2e-05"),
        (0, "0"),
        (-0.5, "-0.5"),
    ],
)
def test_axis_numbers_are_short(value, words):
    assert short(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(85.913, "85.9"), (0.4812, "0.4812"), (2910, "2,910"), (None, "not scored here"), ("a", "a")]
)
def test_scores_have_a_digit_that_counts(value, words):
    assert number(value) == words


@pytest.mark.parametrize(
    ("value", "key", "words"),
    [(0.4213, "mfu", "42.1%"), (1234.5, "tokens_per_s", "1,234"), ("nan", "loss", "nan"), (None, "loss", "")],
)
def test_logged_numbers_have_their_unit(value, key, words):
    assert logged(value, key) == words


def test_the_day_is_written_once():
    assert clock("2026-01-31T12:05:09+00:00") == "2026-01-31 12:05"
    assert clock(None) == ""
    assert span("2026-01-31T12:05:09", "2026-01-31T13:00:00") == "2026-01-31 12:05 to 13:00"
    assert span("2026-01-31T12:05:09", "2026-02-01T13:00:00") == "2026-01-31 12:05 to 2026-02-01 13:00"


def test_flags_are_written_as_they_are_typed():
    flags = {"b": [1, 2], "a": "x y", "c": None, "d": False}
    assert with_flags(flags) == [("--a", "x y"), ("--b", "1 2"), ("--d", "False")]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 seconds"),
        (1, "1 second"),
        (7, "7 seconds"),
        (99.7, "1.7 minutes"),
        (120, "2.0 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_times_are_in_the_unit_of_their_size(seconds, words):
    assert time_line(seconds) == words


@pytest.mark.parametrize(("number", "words"), [(1, "1 step"), (0.17, "0.17 steps"), (12345, "12,345 steps")])
def test_numbers_have_their_noun(number, words):
    assert count(number, "step") == words
