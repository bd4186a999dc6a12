"""Impossible paths and sizes among a run's flags are reported before anything is loaded."""

import os
from types import SimpleNamespace

import pytest

from llava_lite.train.arguments.paths import check_enough_records, check_needed, check_output
from llava_lite.train.train import main, train


@pytest.fixture
def refused(stage_flags, unloadable, tmp_path, capfd):
    """Start a run that must end before a model is loaded; return the line that it ends with."""

    def start(*flags):
        with pytest.raises(SystemExit) as stopped:
            main(stage_flags("projector", tmp_path / "out", "--model_name_or_path", unloadable, *flags))
        shown = capfd.readouterr().err
        assert stopped.value.code == 1
        assert "Traceback" not in shown
        return shown.splitlines()[-1].removeprefix("llava-lite train: ")

    return start


@pytest.fixture
def here(tmp_path, monkeypatch, unloadable, toy_tower_dir):
    """Stand in a directory with an image directory, a stage 1, a file and a tower."""
    for name in ("images", "stage1", "empty", "out/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("stage1/mm_projector.bin", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "llama").symlink_to(unloadable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GONE = ": there is no such directory."


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--model_name_or_path", "./llma", f"{GONE} Did you mean './llama'?"),
        ("--model_name_or_path", "notes.txt", " is a file; give the directory"),
        ("--vision_tower", "./clip", f"{GONE} Give the path of one, or a hub id such as openai/clip"),
        ("--vision_tower", "llama", " is no vision tower (model_type 'llama'); known: blip-2, clip_vision_model,"),
        ("--image_folder", "imges", f"{GONE} Did you mean 'images'?"),
        ("--image_folder", "notes.txt", " is a file; give a directory."),
        ("--pretrain_mm_mlp_adapter", "stage1", " is a directory; give the file: 'stage1/mm_projector.bin'."),
        ("--pretrain_mm_mlp_adapter", "empty", ": this directory holds no mm_projector.bin."),
        ("--pretrain_mm_mlp_adapter", "stage1/mm_proj.bin", ": there is no such file. Did you mean 'stage1/mm_proj"),
        ("--output_dir", "notes.txt", " is a file; give a directory."),
        ("--output_dir", "notes.txt/x", " cannot be written: 'notes.txt' does not allow it."),
        ("--output_dir", "llama", " is the directory of --model_name_or_path, which this run would replace"),
        ("--resume_from_checkpoint", "checkpoint-4", GONE),
    ],
)
def test_path_that_does_not_exist_is_reported_before_a_model_is_loaded(flag, value, words, refused, here):
    assert refused(flag, value).startswith(f"{flag} {value!r}{words}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_path gone.json", "--data_path gone.json: no such file."),
        ("--eval_data_path gone.json", "--eval_data_path gone.json: no such file."),
        ("--deepspeed zero9.json", "--deepspeed zero9.json: there is no such file. Give one of zero2, zero3"),
        ("--output_dir out --resume_from_checkpoint out/checkpoint-4", f"{GONE} There is 'out/checkpoint-3'."),
        ("--output_dir o --resume_from_checkpoint x", f"{GONE} 'o' holds no checkpoint."),
        (
            "--model m --lr 3",
            "unknown flag --model: write --model_name_or_path. unknown flag --lr: write --learning_r",
        ),
    ],
)
def test_other_impossible_flags_are_reported_too(flags, words, refused, here):
    assert words in refused(*flags.split())


def test_everything_that_is_needed_is_asked_for_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"^--model_name_or_path \(.*\), --data_path \(.*\) and --output_dir \(.*\) are needed\."
    ):
        check_needed([])
    with pytest.raises(ValueError, match=r"^--output_dir \(.*\) is needed\."):
        check_needed(["--model-name-or-path=m", "--data_path", "d", "--output_dir"])
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\ndata: {data_path: [d]}\noutput_dir: o\n")
    check_needed([str(tmp_path / "run.yaml")])


def test_output_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match=f"'{tmp_path}' does not allow it"):
        check_output(str(tmp_path / "a/b"))


def sizes(num_ranks=1, train=4, evaluation=4, packing="samples", drop=True):
    return SimpleNamespace(
        dataloader_drop_last=drop,
        per_device_train_batch_size=train,
        per_device_eval_batch_size=evaluation,
        world_size=num_ranks,
        packing=packing,
    )


@pytest.mark.parametrize(
    ("num_train", "num_eval", "args", "words"),
    [
        (3, None, sizes(), "nothing to train on: 3 records are fewer than the 4 of one batch (1 rank x --per_dev"),
        (7, None, sizes(num_ranks=2), "7 records are fewer than the 8 of one batch (2 ranks x"),
        (8, 3, sizes(), "nothing to evaluate on: 3 records are fewer than the 4 of one batch (1 rank x --"),
        (4, None, sizes(), None),
        (3, 3, sizes(drop=False), None),
        # One pack is a batch.
        (3, None, sizes(train=1, packing="tokens"), None),
    ],
)
def test_fewer_records_than_a_batch_are_reported_where_the_last_one_is_dropped(num_train, num_eval, args, words):
    records = [range(num_train), None if num_eval is None else range(num_eval)]
    if words is None:
        check_enough_records(*records, args)
        return
    with pytest.raises(ValueError, match="--dataloader_drop_last True leaves") as refused:
        check_enough_records(*records, args)
    assert words in str(refused.value)


@pytest.mark.parametrize("more", [["--max_steps", "3"], ["--num_train_epochs", "1"]])
def test_a_run_whose_batches_are_all_dropped_ends_in_a_sentence(more, stage_flags, tmp_path):
    flags = [*more, "--dataloader_drop_last", "True", "--per_device_train_batch_size", "25"]
    with pytest.raises(ValueError, match=r"leaves nothing to train on: 24 records are fewer than the 25 of one batch"):
        train(stage_flags("projector", tmp_path / "out", *flags))
