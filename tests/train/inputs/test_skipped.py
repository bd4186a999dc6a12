"""Records that turn out to be broken while a run reads them: left out for good, and the run resumes bit for bit."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from llava_lite.data.errors import DataError
from llava_lite.data.skipped import LeftOut
from llava_lite.train.inputs.skipped import SkipLog
from llava_lite.train.train import prepare, run, train

CLOCK = {"tokens_per_s", "mfu", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
CLOCK |= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
SKIP = "--bad_record skip --max_bad_fraction 0.3"
TWO_EPOCHS = "--num_train_epochs 2 --logging_steps 1 --save_strategy steps --save_steps 2 --weight_decay 0"


def rot(path):
    """Damage the middle of a PNG, whose head and tail stay those of an image."""
    data = bytearray(Path(path).read_bytes())
    start = data.find(b"IDAT") + 6
    data[start : start + 20] = bytes(20)
    Path(path).write_bytes(data)


class After(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        """Do it."""
        if state.global_step == self.step:
            self.action()


def train_with(flags, *callbacks):
    """Train with callbacks; return the trainer."""
    stage = prepare(flags)
    for callback in callbacks:
        stage.trainer.add_callback(callback)
    return run(stage)


def numbers(trainer):
    """Return every logged number that does not hang on the clock, and the digests of the weights that train."""
    log = [{k: v for k, v in line.items() if k not in CLOCK} for line in trainer.state.log_history]
    weights = [param.detach().numpy().tobytes() for param in trainer.model.parameters() if param.requires_grad]
    return log, [hashlib.sha256(weight).hexdigest() for weight in weights]


def skipped_log(directory, name="skipped_records.jsonl"):
    """Return the lines of a log of skipped records."""
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def resumed_run(flags, full, step, tmp_path):
    """Return the numbers of a run that resumes from a step of another one, in an output directory of its own."""
    out = tmp_path / f"from_{step}"
    more = ["--output_dir", str(out), "--resume_from_checkpoint", f"{full}/checkpoint-{step}"]
    found = numbers(train([*flags, *more]))
    return found, skipped_log(out)


WAYS = {
    "one process": ("full", ""),
    "workers": ("full", "--dataloader_num_workers 2 --group_by_modality_length True"),
    "accumulation": ("lora", "--gradient_accumulation_steps 2 --per_device_train_batch_size 1"),
    "experts": ("moe", "--dataloader_num_workers 1"),
    "packs": ("full", "--packing tokens --packing_tokens 120 --per_device_train_batch_size 1 --max_steps 12"),
    "any resolution": ("full", "--image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad"),
    "features": ("full", "--feature_cache FEATURES"),
    "images alone": ("projector", "--per_device_train_batch_size 2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_with_damaged_images_resumes_bit_for_bit(way, stage_flags, tmp_path, toy_data):
    stage, more = WAYS[way]
    path, images = toy_data(tmp_path / "data", num_records=22, text_only_every=0 if stage == "projector" else 3)
    for number in (4, 10, 11):
        rot(f"{images}/{number}.png")
    words = f"{TWO_EPOCHS} {SKIP} {more}".replace("FEATURES", str(tmp_path / "features")).split()
    flags = stage_flags(stage, tmp_path / "full", *words, data=(path, images))
    full = train(flags)
    lines = skipped_log(full.args.output_dir)
    assert sorted(line["id"] for line in lines) == ["toy_004", "toy_010", "toy_011"]
    assert all(f"{images}/{line['position']}.png" in line["reason"] for line in lines)
    assert {line["kind"] for line in lines} == {"image"}
    assert all(line["path"] == f"{images}/{line['position']}.png" for line in lines)
    steps = sorted(int(path.name.split("-")[1]) for path in Path(full.args.output_dir).glob("checkpoint-*"))
    for step in (steps[0], steps[-2]):
        found, log = resumed_run(flags, full.args.output_dir, step, tmp_path)
        assert found == numbers(full)
        assert log == lines


def test_the_log_of_an_id_that_has_no_bytes_is_read_back(tmp_path):
    path = tmp_path / "out" / "skipped_records.jsonl"
    line = {
        "file": "a.json",
        "position": 1,
        "id": "\ud800\u4e2d",
        "kind": "image",
        "reason": "\udfff",
        "path": "\ud83d",
    }
    log = SkipLog(LeftOut(4), "skip", 1.0, path, num_records=4)
    log.begin([line], [{**line, "place": 2, "step": 1, "since": 0}])
    log.leave_out([{**line, "place": 3}], 2)
    assert skipped_log(tmp_path / "out") == [
        line,
        {**line, "place": 2, "step": 1, "since": 0},
        {**line, "place": 3, "step": 2, "since": 0},
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_stays_out_even_if_it_comes_back(workers, stage_flags, tmp_path, toy_data):
    path, images = toy_data(tmp_path / "data", num_records=22)
    words = f"{TWO_EPOCHS} {SKIP} --dataloader_num_workers {workers}".split()
    flags = stage_flags("full", tmp_path / "full", *words, data=(path, images))
    kept = shutil.copytree(images, tmp_path / "kept")

    def remove():
        for number in range(0, 22, 5):
            Path(images, f"{number}.png").unlink(missing_ok=True)

    full = train_with(flags, After(3, remove))
    lines = skipped_log(full.args.output_dir)
    # 0 and 15 are text. Those of the first epoch that were read before are found in the second.
    assert sorted(line["id"] for line in lines) == ["toy_005", "toy_010", "toy_020"]
    if not workers:
        for step in (4, 10):
            assert resumed_run(flags, full.args.output_dir, step, tmp_path / "gone")[0] == numbers(full)
    shutil.copytree(kept, images, dirs_exist_ok=True)
    for step in (2, 4, 8):
        assert resumed_run(flags, full.args.output_dir, step, tmp_path / "back") == (numbers(full), lines)


def test_a_mended_image_stays_out_after_a_run_was_stopped_and_started_again(stage_flags, tmp_path, toy_data):
    path, images = toy_data(tmp_path / "data", num_records=22)
    shutil.copy(f"{images}/4.png", tmp_path / "sound.png")
    rot(f"{images}/4.png")
    flags = stage_flags("full", tmp_path / "full", *f"{TWO_EPOCHS} {SKIP}".split(), data=(path, images))
    full = train(flags)
    again = [*flags, "--output_dir", str(tmp_path / "again")]

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        train_with(again, After(7, kill))
    shutil.copy(tmp_path / "sound.png", f"{images}/4.png")
    assert numbers(train(again)) == numbers(full)
    assert skipped_log(tmp_path / "again") == skipped_log(full.args.output_dir)


def test_what_the_check_left_out_at_first_stays_out_and_what_it_finds_later_keeps_its_place(
    stage_flags, tmp_path, toy_data
):
    path, images = toy_data(tmp_path / "data", num_records=22)
    shutil.move(f"{images}/1.png", tmp_path / "1.png")
    flags = stage_flags("full", tmp_path / "full", *f"{TWO_EPOCHS} {SKIP}".split(), data=(path, images))
    full = train(flags)
    shutil.move(tmp_path / "1.png", f"{images}/1.png")
    assert resumed_run(flags, full.args.output_dir, 6, tmp_path) == (numbers(full), skipped_log(full.args.output_dir))
    # Missing, where its second epoch has not read it yet: the samples are as many as they were.
    Path(images, "2.png").unlink()
    _, log = resumed_run(flags, full.args.output_dir, 6, tmp_path / "again")
    assert [(line["id"], line.get("step")) for line in log] == [("toy_001", None), ("toy_002", 6)]
    with pytest.raises(DataError, match=r"1 of 22 records.*\n.*'toy_002' .*2\.png': there is no such file"):
        resumed_run([*flags, "--bad_record", "raise"], full.args.output_dir, 6, tmp_path / "raise")


PACKS = "--packing tokens --packing_tokens 200 --per_device_train_batch_size 1"


@pytest.mark.parametrize("more", ["", "--dataloader_num_workers 2", PACKS, "--feature_cache FEATURES"])
def test_without_skip_the_run_ends_with_the_record_and_its_file(more, stage_flags, tmp_path, toy_data):
    path, images = toy_data(tmp_path / "data", num_records=22)
    rot(f"{images}/10.png")
    flags = stage_flags("full", tmp_path / "out", *TWO_EPOCHS.split(), *more.split(), data=(path, images))
    flags = [str(tmp_path / "features") if flag == "FEATURES" else flag for flag in flags]
    with pytest.raises(DataError) as caught:
        train(flags)
    message = str(caught.value)
    assert "record 'toy_010' (toy.json[10])" in message
    assert f"{images}/10.png" in message
    assert "--bad_record skip" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "skipped_records.jsonl").exists()


def test_more_than_the_fraction_ends_the_run_with_their_names(stage_flags, tmp_path, toy_data):
    path, images = toy_data(tmp_path / "data", num_records=22)
    for number in (4, 5, 7):
        rot(f"{images}/{number}.png")
    flags = stage_flags("full", tmp_path / "out", *TWO_EPOCHS.split(), data=(path, images))
    with pytest.raises(DataError, match=r"(?s)3 of 22 records.*at most 10\.00%") as caught:
        train([*flags, "--bad_record", "skip", "--max_bad_fraction", "0.1"])
    assert all(f"'toy_00{number}' (toy.json[{number}])" in str(caught.value) for number in (4, 5, 7))
    # What it had found until then is known to the run that resumes with a higher limit.
    trainer = train([*flags, *SKIP.split()])
    assert len(skipped_log(trainer.args.output_dir)) == 3


def test_a_step_without_any_record_changes_nothing_and_the_next_one_trains(stage_flags, tmp_path, toy_data, caplog):
    path, images = toy_data(tmp_path / "data", num_records=3, text_only_every=0)
    for number in (0, 1):
        rot(f"{images}/{number}.png")
    more = "--bad_record skip --max_bad_fraction 0.7 --per_device_train_batch_size 1 --logging_steps 1 --max_steps 6"
    flags = stage_flags("full", tmp_path / "out", *more.split(), "--weight_decay", "0", data=(path, images))
    with caplog.at_level(logging.WARNING):
        trainer = train(flags)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6
    assert sorted(loss > 0 for loss in losses) == [False] * 4 + [True] * 2
    assert len(skipped_log(tmp_path / "out")) == 2


def test_the_loss_of_a_step_is_that_of_the_records_that_are_left(stage_flags, tmp_path, toy_data):
    path, images = toy_data(tmp_path / "data", num_records=6, text_only_every=0)
    records = [record for record in json.loads(Path(path).read_text()) if record["image"] != "3.png"]
    (tmp_path / "less.json").write_text(json.dumps(records))
    rot(f"{images}/3.png")
    losses = []
    for data, batch, micro in ((path, 6, 1), (path, 2, 3), (path, 1, 6), (tmp_path / "less.json", 5, 1)):
        more = f"{SKIP} --max_steps 1 --logging_steps 1 --per_device_train_batch_size {batch}"
        out = tmp_path / f"out_{Path(data).stem}_{batch}"
        flags = stage_flags("full", out, *more.split(), data=(data, images))
        trainer = train([*flags, "--gradient_accumulation_steps", str(micro)])
        losses.append(trainer.state.log_history[0]["loss"])
    # Sums of float32 in another order.
    assert losses == pytest.approx([losses[-1]] * 4, rel=1e-5)


def test_an_evaluation_leaves_records_out_for_good(stage_flags, tmp_path, toy_data):
    train_data = toy_data(tmp_path / "data", num_records=22)
    held_out, images = toy_data(tmp_path / "held_out", num_records=9, seed=3)
    everything = shutil.copytree(images, train_data[1], dirs_exist_ok=True)
    rot(f"{everything}/0.png") if Path(everything, "0.png").exists() else rot(f"{everything}/1.png")
    more = f"{TWO_EPOCHS} {SKIP} --eval_data_path {held_out} --eval_strategy steps --eval_steps 2"
    more += " --num_eval_generations 2 --eval_max_new_tokens 4 --per_device_eval_batch_size 2"
    flags = stage_flags("full", tmp_path / "full", *more.split(), data=train_data)

    def vanish():
        Path(everything, "4.png").unlink()

    kept = shutil.copy(f"{everything}/4.png", tmp_path / "4.png")
    full = train_with(flags, After(5, vanish))
    lines = skipped_log(full.args.output_dir, "skipped_eval_records.jsonl")
    assert {line["id"]: line["step"] for line in lines} == {"toy_001": 0, "toy_004": 6}
    answered = [json.loads(line) for line in (tmp_path / "full" / "generations.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answered} == {"toy_000", "toy_002"}
    shutil.copy(kept, everything)
    for step in (4, 8):
        assert resumed_run(flags, full.args.output_dir, step, tmp_path)[0] == numbers(full)
    with pytest.raises(DataError, match=r"record 'toy_001' \(toy\.json\[1\]\)"):
        train([*flags, "--output_dir", str(tmp_path / "raise"), "--bad_record", "raise"])
