"""A run with files that are missing, damaged or cannot be read has a page that says so where they belong."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from llava_lite.train.monitor.report.page import write_report
from llava_lite.train.monitor.report.read import read_run

EXPERTS = {"0": {"load": [0.5, 0.5], "dead": 0, "dropped": 0.0, "balance_loss": 1.0}}
LOG = [{"step": i, "loss": 3.0 / i, "lm_loss": 3.0 / i, "moe_loss": 0.1, "experts": EXPERTS} for i in range(1, 6)]
LOG.append({"step": 5, "eval_loss": 1.0})
RECORD = {
    "experts": {"0": {"num": 2, "top_k": 1}},
    "parameters": {"experts": {"trained": 30, "frozen": 10, "learning_rate": 2e-5, "dtypes": ["float32"]}},
    "starts": [{"date": "2026-01-31T12:00:00", "step": 0, "ranks": 1, "device": "CPU"}],
    "end": {"date": "2026-01-31T13:00:00", "state": "finished"},
    "images": {"a": ["0_0.jpg"]},
    "settings": {"seed": 7},
}
ANSWERS = [{"step": 5, "id": "a", "prompt": "p", "expected": "x", "answer": "y"}]
SCORE = {"benchmark": "pope", "metric": "F1", "score": 80.0, "run": {"model": "x"}}
HEADINGS = ["The run", "Data", "What trained", "Curves", "Expert load", "Samples", "Scores", "Cost", "Flags"]
NO_JSON = "is damaged (no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1))."


@pytest.fixture
def complete(run_dir):
    """The directory of a run of a model with experts, which lacks nothing."""
    directory = run_dir(LOG, run=RECORD, generations=ANSWERS, config={"model_type": "llava_llama"})
    (directory / "samples").mkdir()
    Image.new("RGB", (20, 10)).save(directory / "samples/0_0.jpg")
    (directory / "eval").mkdir()
    (directory / "eval/results.json").write_text(json.dumps(SCORE))
    return directory


@pytest.fixture
def sections_of(page_text):
    """Return a function: the directory of a run -> the texts of its page by heading, after all are found."""

    def read(directory):
        text = page_text(write_report(directory).read_text(encoding="utf-8"))
        at = [text.index(f"\n{heading}\n") for heading in ["Worth knowing", *HEADINGS]]
        assert at == sorted(at)
        ends = [*at[1:], len(text)]
        return {
            name: " ".join(text[start + 1 : end].split()).removeprefix(name).strip()
            for name, start, end in zip(["Worth knowing", *HEADINGS], at, ends, strict=True)
        }

    return read


def damage(path, how):
    """Remove a file, write another text, or put a directory in its place, which nobody can read as a file."""
    path.unlink()
    if how == "unreadable":
        path.mkdir()
    elif how == "endless":
        path.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_text(how)


FAULTS = [
    ("{bad", NO_JSON),
    ("[1]", "is damaged (it holds a list, expected an object)."),
    ("", "is damaged (no JSON: Expecting value: line 1 column 1 (char 0))."),
    ("unreadable", "cannot be read (Is a directory)."),
]


def test_a_complete_run_has_nothing_to_say(complete, sections_of):
    found = sections_of(complete)
    assert found["Worth knowing"].startswith("Nothing unusual was found.")
    assert not [
        name
        for name, text in found.items()
        for word in ("damaged", "is missing", "cannot")
        if word in text[40:] and name != "Worth knowing"
    ]


@pytest.mark.parametrize(("how", "fault"), FAULTS)
def test_a_damaged_run_json_is_named_in_each_section_that_is_made_of_it(how, fault, complete, sections_of):
    damage(complete / "run.json", how)
    found = sections_of(complete)
    for name in ("Worth knowing", "The run", "Data", "What trained", "Flags"):
        assert f"run.json {fault}" in found[name], name
    assert f"Which images of samples/ belong to the answers is not known: run.json {fault}" in found["Samples"]
    assert "earlier versions" not in str(found)


def test_a_missing_run_json_is_that_of_an_earlier_version(complete, sections_of):
    damage(complete / "run.json", "missing")
    found = sections_of(complete)
    for name in ("The run", "Data", "What trained", "Flags"):
        assert "the directory has no run.json. Runs of earlier versions wrote none." in found[name], name


@pytest.mark.parametrize(("how", "fault"), [*FAULTS[:3], FAULTS[3]])
def test_a_damaged_score_is_named_and_no_score_that_does_not_exist(how, fault, complete, sections_of):
    damage(complete / "eval/results.json", how)
    found = sections_of(complete)
    assert f"eval/results.json {fault}" in found["Scores"]
    assert "None found" not in found["Scores"]
    assert f"eval/results.json {fault}" in found["Worth knowing"]


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("missing", "metrics.jsonl is missing."),
        ("unreadable", "metrics.jsonl cannot be read (Is a directory)."),
        ("endless", "metrics.jsonl cannot be read (it is a device or a pipe)."),
        ("pipe", "metrics.jsonl cannot be read (it is a device or a pipe)."),
        ("{bad\n[1]\n", "metrics.jsonl is damaged (no JSON object, and left out: 2 lines, the first of them line 1)."),
    ],
)
def test_without_a_log_curves_expert_load_and_cost_say_so(how, fault, complete, sections_of):
    damage(complete / "metrics.jsonl", how)
    found = sections_of(complete)
    for name in ("Curves", "Expert load", "Cost"):
        assert fault in found[name], name
    assert fault.rstrip(".") in found["Worth knowing"]
    # The trainer's own log has no load of experts.
    log = [{key: value for key, value in line.items() if key != "experts"} for line in LOG]
    (complete / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": log}))
    found = sections_of(complete)
    assert fault in found["Curves"]
    assert "These are the numbers that trainer_state.json kept." in found["Curves"]
    assert found["Expert load"] == fault
    assert "The curves as numbers All 5 logs" in found["Curves"]


def test_lines_in_the_middle_that_are_damaged_are_left_out_alone(complete, sections_of):
    lines = (complete / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1:2] = [b"\xff\xfe\x00", b'{"step": 2, "lo']
    # The last one is being written.
    (complete / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'{"step": 6, "lo')
    assert [line["step"] for line in read_run(complete).lines] == [1, 3, 4, 5, 5]
    fault = "metrics.jsonl is damaged (no JSON object, and left out: 2 lines, the first of them line 2)."
    found = sections_of(complete)
    assert fault in found["Curves"]
    assert fault in found["Worth knowing"]


def test_images_and_answers_that_are_gone_are_named(complete, sections_of):
    (complete / "samples/0_0.jpg").write_bytes(b"\xff\xd8 no image")
    found = sections_of(complete)
    assert "samples/0_0.jpg is damaged (no JPEG)." in found["Samples"]
    first = "1 image of the samples cannot be shown; the first: samples/0_0.jpg is damaged (no JPEG)."
    assert first in found["Worth knowing"]
    (complete / "samples/0_0.jpg").unlink()
    (complete / "samples").rmdir()
    found = sections_of(complete)
    assert "samples/0_0.jpg is missing." in found["Samples"]
    assert "samples/0_0.jpg is missing." in found["Worth knowing"]
    (complete / "generations.jsonl").unlink()
    found = sections_of(complete)
    assert found["Samples"] == "generations.jsonl is missing."
    assert "generations.jsonl is missing" in found["Worth knowing"]
    (complete / "generations.jsonl").mkdir()
    assert sections_of(complete)["Samples"] == "generations.jsonl cannot be read (Is a directory)."


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json", "skipped_records.jsonl"])
def test_the_other_files_are_named_too(name, complete, sections_of):
    (complete / name).unlink(missing_ok=True)
    (complete / name).write_text("{bad\n")
    found = sections_of(complete)
    assert f"{name} is damaged (no JSON" in found["Data" if name.startswith("skipped") else "The run"]
    assert f"{name} is damaged (no JSON" in found["Worth knowing"]


def test_a_section_whose_file_has_another_content_says_so_and_the_others_are_there(complete, sections_of):
    record = RECORD | {"data": {"train": {"sources": [["a", 1]]}}, "parameters": {"a": 3}}
    (complete / "run.json").write_text(json.dumps(record))
    found = sections_of(complete)
    for name, reason in (("Data", "KeyError: 'lengths'"), ("What trained", "TypeError: ")):
        words = f"{name}: not shown, since a file of the run is not as llava-lite writes it ({reason}"
        assert words in found[name]
        assert words in found["Worth knowing"]
    assert "flag" in found["Flags"]


def test_a_page_is_made_without_transformers_and_torch(complete):
    # They take seconds, and what they import writes to the terminal.
    code = (
        "import sys; from llava_lite.cli import main; main(['report', sys.argv[1]]); "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'bitsandbytes'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(complete)], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == (f"{complete}/report.html\n[]\n", "")
