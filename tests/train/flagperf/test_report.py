"""FlagPerf's formulas, by hand and by the figures that it publishes."""

import pytest

from llava_lite.train.flagperf.report import Case, Stage, our_figures, table, their_figures, their_lines

A800 = 312e12


def case(**changes):
    """10 records of 100 tokens, padded to 120, in 4 s; then 20 records in 10 s; two chips."""
    stages = (Stage(4.0, 10, 1000, 1200, 2.0), Stage(10.0, 20, 2000, 2400, 5.0))
    return Case(**({"size": "7b", "theoryflops": A800, "num_chips": 2, "stages": stages, "counted": 10**9} | changes))


def test_tokens_and_mfu_by_its_formulas():
    found = their_figures(case())
    assert found["pretrain_system_tokens_per_s"] == pytest.approx(120 * 10 / 4)
    assert found["pretrain_tokens_per_s"] == pytest.approx(150)
    assert found["pretrain_tokens_per_tflops"] == pytest.approx(150 / 312)
    assert found["pretrain_mfu"] == pytest.approx(150 * 7e9 * 2 / A800)
    assert found["finetune_mfu"] == pytest.approx(120 * 7e9 * 6 / A800)
    average = (1200 * 7e9 * 2 + 2400 * 7e9 * 6) / 14 / 2 / A800
    assert found["mfu"] == pytest.approx(average)
    assert found["computing_power_tflops"] == pytest.approx(average * 312)


@pytest.mark.parametrize(
    ("size", "rates", "published"),
    [("7b", (4013, 2937), (0.1801, 0.3957)), ("13b", (2273.54, 1622.90), (0.1895, 0.4057))],
)
def test_published_mfu_follows_from_published_tokens(size, rates, published):
    # One record a token, so that tokens a second are what is given.
    stages = tuple(Stage(1.0, 1, round(rate), rate, 1.0) for rate in rates)
    found = their_figures(case(size=size, num_chips=1, stages=stages))
    # 7B: 39.54% follows from the published tokens a second, and 39.57% is published.
    assert [found["pretrain_mfu"], found["finetune_mfu"]] == pytest.approx(published, abs=4e-4)


def test_ours_counts_real_tokens_and_the_gradient_through_the_frozen_decoder():
    found = our_figures(case())
    assert found["pretrain_tokens_per_s"] == 1000 / 2 / 2
    assert found["pretrain_mfu"] == pytest.approx(250 * 4e9 / A800)
    assert found["finetune_mfu"] == pytest.approx(200 * 6e9 / A800)


def test_lines_are_those_that_it_prints_in_its_order():
    lines = their_lines(case(mmmu=0.359))
    labels = [line.rpartition(" ")[0] if line[-1].isdigit() else line for line in lines]
    stage = ["System tokens per second: ", "Tokens/p/s: ", "Theory TFLOPS: ", "Tokens/TFLOPS: ", "MFU: "]
    assert labels == [
        *("pretrain time is", "tokens_pretrain is", "finetune time is", "tokens_finetune is", "MMMU :"),
        *("Pretrain stage", *stage, "Finetune stage", *stage),
        *("two-stage average", "MFU: ", "Actual computing power: "),
    ]
    assert "MMMU : 0.359" in lines


def test_table_shows_the_published_figures_beside():
    text = "\n".join(table(case(mmmu=None)))
    assert "published, 8 A800" in text
    assert "4,013" in text
    assert "not measured" in text
