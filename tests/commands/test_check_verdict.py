"""`llava-lite check` and a training run agree on whether the run reaches its first step, and why not."""

import json
import os

import pytest
from conftest import draw_image

from llava_lite.commands.check import main
from llava_lite.train.train import train


def record(record_id, question="<image>\nq", answer="an answer", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "conversations": turns, **more}


GOOD = [record(f"r{i}", image=f"{i}.png") for i in range(4)] + [record("text", "q")]
SKIP = "--bad_record skip --max_bad_fraction"
ONE_GONE = [*GOOD[:3], record("gone", image="gone.png")]
LONG = record("long", "<image>\n" + "why " * 100, image="0.png")

# name -> records, flags, a part of the reason; None for a run that trains.
CASES = {
    "good": (GOOD, "", None),
    "projector": (GOOD, "--tuning projector --version plain", None),
    "a missing file": (ONE_GONE, "", "1 record must be mended"),
    "a missing file, skipped": (ONE_GONE, "--bad_record skip --max_bad_fraction 0.25", None),
    "too many missing files": (ONE_GONE, "--bad_record skip --max_bad_fraction 0.2", "leaves out at most 20.00%"),
    "nothing left": (ONE_GONE[3:], "--bad_record skip --max_bad_fraction 1", "none of 1 records can be used"),
    "nothing supervised": ([LONG], "--model_max_length 50", "none of 1 record can be used"),
    "an answer beyond the end, skipped": ([LONG, *GOOD], "--model_max_length 70 --bad_record skip", "1 of 6 records"),
    "an image that nobody sees": ([*GOOD, record("r", "q", img="0.png")], "", "1 record must be mended"),
    "a placeholder without an image": ([*GOOD, record("r")], "", "1 record must be mended"),
    "a placeholder as text": ([record("r")], "--placeholder_as_text True", None),
    "a projector without images": (GOOD[4:], "--tuning projector", "none of 1 records has an image"),
    "a chat template that is not there": (GOOD, "--version chat", "--version chat: "),
    "an end token that is no token": (GOOD, "--version chatml_direct", "--version chatml_direct ends an answer with"),
    "no record": ([], "", "holds no record"),
    "a split of all records": (GOOD, "--eval_split 5", "--eval_split 5.0 holds out 5 of 5 records"),
    "fewer records than a batch": (GOOD, "--dataloader_drop_last True", "5 records are fewer than the 8 of one batch"),
    "a record longer than a pack": (
        GOOD,
        "--packing tokens --packing_tokens 40 --per_device_train_batch_size 1",
        "tokens but a pack holds 40",
    ),
    "flags that contradict each other": (GOOD, "--packing tokens", "--packing tokens and --per_device_train_batch"),
    "evaluated on a missing file": (GOOD, "--eval_data_path EVAL --eval_strategy no", "1 record must be mended"),
    "groups smaller than a batch": (GOOD, "--data_path META", "of META has"),
    "a group of its own batch": (GOOD, "--data_path META --per_device_train_batch_size 1", None),
}


@pytest.fixture
def flags(tmp_path, monkeypatch, toy_llm_dir, toy_tower_dir):
    """Return a function: records, more flags -> the flags of a run of one step."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        draw_image(i).save(images / f"{i}.png")

    def make(records, more=""):
        (tmp_path / "train.json").write_text(json.dumps(records))
        (tmp_path / "text.json").write_text(json.dumps(GOOD[4:]))
        (tmp_path / "eval.json").write_text(json.dumps(ONE_GONE))
        meta = {"META": [{"path": str(tmp_path / f"{name}.json"), "type": name} for name in ("train", "text")]}
        (tmp_path / "meta.yaml").write_text(json.dumps(meta))
        more = more.replace("EVAL", str(tmp_path / "eval.json")).replace("META", str(tmp_path / "meta.yaml"))
        return (
            f"--data_path {tmp_path / 'train.json'} --image_folder {images} --vision_tower {toy_tower_dir('clip')} "
            f"--model_name_or_path {toy_llm_dir('llama')} --mm_projector_type mlp2x_gelu --max_steps 1 --use_cpu True "
            f"--output_dir {tmp_path / 'out'} --save_strategy no --disable_tqdm True --per_device_train_batch_size 8 "
            f"{more}"
        ).split()

    return make


def reason_of(flags) -> str | None:
    """Return why a run stops before its first step, None if it takes it."""
    try:
        assert train(flags).state.global_step == 1
    except (ValueError, OSError) as error:
        return str(error)
    return None


def check(flags, tmp_path) -> tuple[int, dict]:
    """Return the exit status of a check, and its report."""
    path = tmp_path / "report.json"
    try:
        status = main([*flags, "--report", str(path)])
    except (ValueError, OSError):
        # The program prints it, and ends with this.
        status = 1
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_check_says_not_ready_where_training_fails_and_ready_where_it_trains(case, flags, tmp_path):
    records, more, words = CASES[case]
    status, report = check(flags(records, more), tmp_path)
    reason = reason_of(flags(records, more))
    assert (status, report["would_train"]) == ((0, True) if reason is None else (1, False)), reason
    assert (words is None) == (reason is None), reason
    if words is not None:
        assert words in report["reason"]
    assert not (tmp_path / "out" / "skipped_records.jsonl").exists() or "skip" in more


def test_a_check_writes_nothing_into_the_output_directory_and_nothing_where_it_is_started(
    flags, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check(flags(ONE_GONE, "--bad_record skip --max_bad_fraction 0.5"), tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "here").iterdir())


def test_the_report_names_every_bad_record_with_its_place_and_path(flags, tmp_path, capsys):
    cut = tmp_path / "images" / "1.png"
    cut.write_bytes(cut.read_bytes()[:60])
    records = [*ONE_GONE, record(7, "<image>", "a", image="../up.png"), record("key", "q", img="0.png"), {"id": "x"}]
    status, report = check(flags(records), tmp_path)
    files = report["files"]["train"]
    bad = files.pop("bad_records")
    place = str(tmp_path / "train.json")
    images = tmp_path / "images"
    assert [(one["file"], one["place"], one["id"], one["kind"], one["path"]) for one in bad] == [
        (place, 1, "r1", "image", str(images / "1.png")),
        (place, 3, "gone", "image", str(images / "gone.png")),
        (place, 4, "7", "image", "../up.png"),
        (place, 5, None, "record", None),
        (place, 6, None, "record", None),
    ]
    assert "truncated" in bad[0]["reason"]
    assert "there is no such file" in bad[1]["reason"]
    assert (status, report["schema"], report["would_train"]) == (1, 1, False)
    assert report["reason"].startswith("5 records must be mended")
    assert files["bad_by_kind"] == {"image": 3, "record": 2}
    counts = ("records", "usable", "bad", "with_images", "text_only", "images", "truncated")
    assert [files[name] for name in counts] == [7, 2, 5, 2, 0, 2, 0]
    assert files["longest"]["id"] in ("r0", "r2")
    printed = capsys.readouterr().out
    assert f"{files['tokens']:,} tokens, " in printed


def test_a_lone_surrogate_in_an_id_or_a_path_is_written_so_that_it_is_read_back(flags, tmp_path):
    records = [*GOOD, record("a\ud800", image="gone.png"), record("b", image="\ud800.png")]
    records += [record("c", image="\udc80/0.png"), record("d", image="\ud800/0.png")]
    bad = tmp_path / "bad.jsonl"
    more = f"{SKIP} 0.5"
    status, report = check([*flags(records, more), "--bad_records_file", str(bad)], tmp_path)
    assert (status, report["would_train"]) == (0, True)
    lines = [json.loads(line) for line in bad.read_text(encoding="utf-8").splitlines()]
    for found in (lines, report["files"]["train"]["bad_records"]):
        assert [(one["id"], one["path"].removeprefix(f"{tmp_path}/images/")) for one in found] == [
            ("a\ud800", "gone.png"),
            ("b", "\ud800.png"),
            ("c", "\udc80/0.png"),
            ("d", "\ud800/0.png"),
        ]
        assert [one["reason"].rpartition(": ")[2] for one in found] == [
            "there is no such file.",
            "no file can have this name.",
            "there is no such file.",
            "no file can have this name.",
        ]
    assert reason_of(flags(records, more)) is None
    log = tmp_path / "out" / "skipped_records.jsonl"
    assert [json.loads(line)["id"] for line in log.read_text(encoding="utf-8").splitlines()] == ["a\ud800", *"bcd"]


def test_supervised_and_truncated_tokens_are_those_of_the_examples(flags, tmp_path):
    from llava_lite.constants import IGNORE_INDEX
    from llava_lite.train.dry_run import DryRun

    argv = flags([*GOOD, record("cut", "q", "so " * 90)], "--model_max_length 100")
    _, report = check(argv, tmp_path)
    dataset, _ = DryRun(argv).open([str(tmp_path / "train.json")])
    examples = [dataset[i] for i in range(6)]
    files = report["files"]["train"]
    assert files["tokens"] == sum(len(one["input_ids"]) for one in examples)
    assert files["truncated"] == 1
    assert files["tokens_before_truncation"] > files["tokens"]
    dataset.max_length = 2048
    labels = [dataset[i]["labels"] for i in range(6)]
    assert files["supervised_tokens"] == sum(int((one != IGNORE_INDEX).sum()) for one in labels)


def test_a_report_of_a_broken_file_says_what_stopped_the_check(flags, tmp_path):
    argv = flags([])
    (tmp_path / "train.json").write_text('[{"id": 1')
    status, report = check(argv, tmp_path)
    assert (status, report["files"]) == (1, {})
    assert "train.json" in report["reason"]


@pytest.mark.parametrize("flag", ["--report", "--bad_records_file"])
def test_a_file_that_cannot_be_written_leaves_the_verdict_on_the_data(flag, flags, tmp_path, capsys):
    (tmp_path / "text").write_text("")
    cases = ("", "not ready: 1 record must be mended"), (f"{SKIP} 0.25", "ready to train: 3 records; 1 left out")
    for path in ("/dev/full", str(tmp_path), str(tmp_path / "text" / "a.json")):
        for more, verdict in cases:
            assert main([*flags(ONE_GONE, more), flag, path]) == 1
            first, line = capsys.readouterr().out.splitlines()[-2:]
            assert first.startswith(verdict)
            assert line.startswith("not written: ")
            assert path in line
            assert ".part" not in line


def test_a_report_that_cannot_be_written_hides_no_error_of_the_check(flags, tmp_path, capsys):
    argv = flags([])
    (tmp_path / "train.json").write_text('[{"id": 1')
    with pytest.raises(ValueError, match=r"train\.json"):
        main([*argv, "--report", str(tmp_path)])
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"not written: '{tmp_path}' is a directory; name a file")
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_not_ready(flags, tmp_path):
    (tmp_path / "images" / "1.png").chmod(0)
    assert check(flags(GOOD), tmp_path)[0] == 1
