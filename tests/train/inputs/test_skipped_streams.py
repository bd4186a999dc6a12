"""Broken records of shards are left out by every stream, for good, and a run on them resumes bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
from toy_shards import caption_files, tar_files, write_caption_tars
from transformers import TrainerCallback

from llava_lite.data.errors import DataError
from llava_lite.train.saving.run_facts import FACTS
from llava_lite.train.train import prepare, run, train

SKIPPED_LOG = "skipped_records-rank00000.jsonl"


def rotten(data):
    """Return a PNG with a damaged middle."""
    start = data.find(b"IDAT") + 6
    return data[:start] + bytes(20) + data[start + 20 :]


@pytest.fixture
def shards(tmp_path):
    """A directory of 4 shards, in one of which two of the images are broken."""
    directory = tmp_path / "shards"
    pattern = write_caption_tars(directory, [9, 5, 7, 8])
    files = [file for n in range(30, 38) for file in caption_files(n)]
    broken = {"000031.png": rotten, "000035.png": lambda data: data[: len(data) // 2]}
    tar_files(directory / "00002.tar", [(name, broken.get(name, bytes)(data)) for name, data in files])
    return pattern


@pytest.fixture
def flags(shards, stage_flags, tmp_path):
    """Return a function: output directory and more flags -> flags of a run of more than two epochs."""
    common = "--max_steps 20 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --shuffle_window 4"
    common += " --save_strategy steps --save_steps 4 --logging_steps 1 --bad_record skip"

    def make(output, *more):
        return stage_flags("projector", output, *common.split(), *more, data=(shards, tmp_path))

    return make


def seen(trainer):
    """Return the losses of a run and the weights that it trained."""
    log = [(line["step"], line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    return log, [param.detach().tolist() for param in trainer.model.parameters() if param.requires_grad]


def skipped_log(directory, name=SKIPPED_LOG):
    """Return the lines of a skipped-records log."""
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


@pytest.mark.parametrize("more", ["", "--dataloader_num_workers 2", "--packing tokens --packing_tokens 90"])
def test_broken_records_are_reported_once_and_stay_out(more, flags, tmp_path):
    if "packing" in more:
        more += " --per_device_train_batch_size 1"
    argv = flags(tmp_path / "full", *more.split())
    full = train(argv)
    assert sorted(line["key"] for line in skipped_log(tmp_path / "full")) == ["000031", "000035"]
    facts = json.loads((tmp_path / "full" / "checkpoint-20" / FACTS).read_text())
    assert sorted(line["key"] for line in facts["left_out"]["train"]["later"]) == ["000031", "000035"]
    # Repaired meanwhile: the run resumes without what it has left out.
    tar_files(tmp_path / "shards" / "mended", [file for n in range(30, 38) for file in caption_files(n)])
    for step in (4, 12):
        out = ["--output_dir", str(tmp_path / f"from_{step}")]
        resumed = train([*argv, *out, "--resume_from_checkpoint", f"{tmp_path}/full/checkpoint-{step}"])
        assert seen(resumed) == seen(full)


def test_a_run_that_was_killed_knows_its_skipped_log(flags, tmp_path):
    argv = flags(tmp_path / "out", "--dataloader_num_workers", "2")
    full = seen(train(argv))
    lines = skipped_log(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-20")
    (tmp_path / "out" / "trainer_state.json").unlink()
    assert seen(train(argv)) == full
    assert skipped_log(tmp_path / "out") == lines


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_left_out_from_there_on(workers, flags, tmp_path):
    class Remover(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "shards" / "00000.tar").unlink(missing_ok=True)

    stage = prepare(flags(tmp_path / "full", "--dataloader_num_workers", str(workers)))
    stage.trainer.add_callback(Remover())
    full = run(stage)
    reasons = [line["reason"] for line in skipped_log(tmp_path / "full")]
    assert any("00000.tar cannot be read from record 0 on (No such file or directory)" in why for why in reasons)
    assert len(seen(full)[0]) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_without_skip_the_run_ends_with_the_record_and_its_shard(workers, flags, tmp_path):
    argv = flags(tmp_path / "out", "--bad_record", "raise", "--dataloader_num_workers", str(workers))
    with pytest.raises(DataError) as caught:
        train(argv)
    assert "record '00003" in str(caught.value)
    assert "00002.tar[" in str(caught.value)
    assert "--bad_record skip" in str(caught.value)
    assert "Traceback" not in str(caught.value)
