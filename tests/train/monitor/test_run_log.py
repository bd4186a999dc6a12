"""metrics.jsonl holds every line of the run once, a resumed run included; the bar shows what counts."""

import json
import math

from llava_lite.train.monitor.log_lines import json_safe, read_metrics
from llava_lite.train.monitor.run_log import RunLog, bar_text


def test_lines_come_back_as_they_were_written(tmp_path):
    log = RunLog(tmp_path)
    log.start(0)
    log.write({"step": 1, "loss": 2.5, "experts": {"0": {"load": [0.5, 0.5]}}})
    log.write({"step": 2, "loss": 2.0})
    assert read_metrics(log.path) == [
        {"step": 1, "loss": 2.5, "experts": {"0": {"load": [0.5, 0.5]}}},
        {"step": 2, "loss": 2.0},
    ]


def test_a_resumed_run_drops_the_lines_it_writes_again(tmp_path):
    log = RunLog(tmp_path)
    log.start(0)
    for step in (1, 2, 3, 4):
        log.write({"step": step})
    log.start(2)
    log.write({"step": 3, "again": True})
    assert read_metrics(log.path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_new_run_begins_an_empty_log(tmp_path):
    log = RunLog(tmp_path)
    log.start(0)
    log.write({"step": 1})
    log.start(0)
    assert read_metrics(log.path) == []


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, is_writer=False)
    log.start(0)
    log.write({"step": 1})
    assert not log.path.exists()


def test_a_line_that_a_crash_cut_short_ends_the_list(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_numbers_that_json_lacks_become_text():
    safe = json_safe({"a": [math.nan, 1.0], "b": (math.inf,)})
    assert json.loads(json.dumps(safe, allow_nan=False)) == {"a": ["nan", 1.0], "b": ["inf"]}


def test_bar_shows_loss_speed_and_mfu():
    logs = {"loss": 1.23456, "moe_loss": 0.01, "tokens_per_s": 1234.5, "mfu": 0.456}
    assert bar_text(logs) == "loss 1.2346, balance 0.0100, 1,234 tok/s/device, MFU 45.6%"
    assert bar_text({"eval_loss": 1.0}) == ""


def test_a_resumed_run_keeps_as_many_lines_of_its_step_as_it_had_written(tmp_path):
    log = RunLog(tmp_path)
    for line in ({"step": 2, "loss": 1.5}, {"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 1.2}, {"step": 5}):
        log.write(line)
    # Saved before the evaluation, which it makes again.
    log.start(4, 1)
    assert read_metrics(log.path) == [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 1.0}]
