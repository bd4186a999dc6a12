"""`llava-lite report` writes the page, and answers what is no run in one sentence."""

import json

from llava_lite import cli


def test_report_writes_the_page_and_prints_its_path(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_what_is_no_run_is_answered_in_one_sentence(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"llava-lite report: {str(tmp_path)!r} holds no run: no metrics.jsonl, run.json, trainer_state.json or "
        "checkpoint-N. Name the --output_dir of `llava-lite train`."
    )
