"""Runs on records with sounds, mixes, images and text: with and without packing, resumed, and answered after."""

import json

import pytest
import torch
from toy_media import media_record, write_imagebind, write_media, write_records, write_sound

from llava_lite.inference import reply
from llava_lite.media_inputs import media_features
from llava_lite.model.builder import load_pretrained_model
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.train.inputs.load import check_ranks_read_media

PROMPTS = "--mm_injection adaption_prompt --adaption_prompt_len 1 --mm_projector_type gated_mlp1x --version alpaca"
SYSTEMS = {"tokens": "", "prompts": f"{PROMPTS} --tuning prompts --learning_rate 1e-2"}
COMMON = "--logging_steps 1 --report_to none --image_aspect_ratio square"
ANSWERS = ["The square is red.", "There are three blue circles.", "Hello!"]


@pytest.fixture
def data(tmp_path):
    """(path, directory) of 12 records: a sound alone, a sound and an image by weight, an image, text."""
    folder = tmp_path / "images"
    write_media(folder)
    records = []
    for k in range(3):
        write_sound(folder / f"{k}.wav", 300 + 200 * k)
        records += [
            media_record(f"sound {k}", "What is it?", ANSWERS[k], audio=f"{k}.wav"),
            media_record(f"both {k}", "And this?", ANSWERS[k], image="bird.png", audio=f"{k}.wav", audio_weight=0.5),
            media_record(f"image {k}", "What colour?", ANSWERS[k], image="bird.png"),
            media_record(f"text {k}", "Hello!", ANSWERS[k]),
        ]
    return write_records(tmp_path / "media.json", records), str(folder)


@pytest.fixture
def run(run_stage, tmp_path, data):
    """Return a function: (output, flags) -> the trainer of a run on a tiny ImageBind."""
    tower = write_imagebind(tmp_path / "imagebind", ["image", "audio"])

    def start(out, flags, **more):
        words = f"{COMMON} {flags}".split()
        return run_stage("full", tmp_path / out, "--vision_tower", tower, *words, data=more.pop("data", data), **more)

    return start


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("system", SYSTEMS)
def test_packed_and_padded_runs_on_media_learn_the_same(run, system):
    options = f"{SYSTEMS[system]} --max_steps 3 --optim sgd --learning_rate 0.1 --seed 3"
    padded, packed = (losses(run(packing, f"{options} --packing {packing}")) for packing in ("none", "samples"))
    assert len(padded) == 3
    assert packed == pytest.approx(padded, abs=1e-5)
    run("packs", f"{SYSTEMS[system]} --max_steps 2 --packing tokens --packing_tokens 300 "
        "--per_device_train_batch_size 1")  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_on_media_resumes_and_answers_about_a_sound_as_it_was_trained(run, system, tmp_path, data):
    options = f"{SYSTEMS[system]} --num_train_epochs 4 --save_strategy steps --save_steps 6 --seed 3"
    options += " --dataloader_num_workers 1"
    full = run("full", options)
    assert sum(losses(full)[-3:]) < sum(losses(full)[:3])
    resumed = run("full", f"{options} --resume_from_checkpoint {tmp_path / 'full' / 'checkpoint-6'}")
    assert losses(resumed) == losses(full)
    _, model, _, _ = load_pretrained_model(str(tmp_path / "full"), None, "llava", device="cpu")
    processor = LlavaLiteProcessor.from_pretrained(tmp_path / "full")
    folder = tmp_path / "images"
    media = {"image": [str(folder / "bird.png"), 1.0], "audio": [str(folder / "1.wav"), 0.5]}
    assert isinstance(reply(model, processor, "And this?", media=media, max_new_tokens=5), str)
    # The example of the data set is what `reply` sees.
    example = full.train_dataset[5]
    assert example["id"] == "both 1"
    with torch.no_grad():
        _, features = model.without_media(example["images"])
    assert torch.equal(features, media_features(model, media))


def test_a_run_evaluates_on_media_and_counts_them(run, caplog):
    with caplog.at_level("INFO", logger="llava_lite"):
        trainer = run("out", "--max_steps 2 --feature_cache auto --eval_split 4 --eval_strategy steps --eval_steps 1 "
                      "--num_eval_generations 4 --eval_max_new_tokens 3")  # fmt: skip
    assert "records whose media together are one image, by kind: 3 image, 6 audio" in caplog.text
    assert "no features are cached on disk: some records have media (image, audio)" in caplog.text
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_features_of_media_are_not_cached(run, tmp_path):
    with pytest.raises(ValueError, match=r"--feature_cache .*store: some records have media \(image, audio\)"):
        run("out", f"--max_steps 1 --feature_cache {tmp_path / 'store'}")


def test_a_tower_of_images_refuses_media_or_leaves_them_out(run_stage, tmp_path, data):
    with pytest.raises(ValueError, match=r"6 of 12 records cannot be used \(6 image\)") as error:
        run_stage("full", tmp_path / "out", "--max_steps", 1, data=data)
    assert "record 'sound 0' (media.json[0]) has 'audio', which this model does not read" in str(error.value)
    skip = ("--bad_record", "skip", "--max_bad_fraction", 1, "--max_steps", 1)
    run_stage("full", tmp_path / "out", *skip, data=data)
    lines = (tmp_path / "out" / "skipped_records.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 6


def test_a_sound_that_breaks_during_a_run_is_left_out(run, tmp_path, data):
    folder = tmp_path / "images"
    (folder / "cut.wav").write_bytes((folder / "0.wav").read_bytes()[:48])
    records = json.loads((tmp_path / "media.json").read_text())
    path = write_records(tmp_path / "cut.json", [*records, media_record("cut", audio="cut.wav")])
    flags = "--num_train_epochs 1 --packing none"
    with pytest.raises(ValueError, match=r"record 'cut' .*cannot use the audio"):
        run("raises", flags, data=(path, str(folder)))
    trainer = run("skips", f"{flags} --bad_record skip --max_bad_fraction 0.2", data=(path, str(folder)))
    assert losses(trainer)
    assert "cut.wav" in (tmp_path / "skips" / "skipped_records.jsonl").read_text()


def test_zero_3_on_several_ranks_is_refused():
    class Found:
        num_media, zero_stage, world_size = {"audio": 3}, 3, 2

    with pytest.raises(ValueError, match=r"ZeRO-3 on 2 ranks cannot train on records with media \(audio\)"):
        check_ranks_read_media(Found, Found)
    Found.zero_stage = 2
    check_ranks_read_media(Found, Found)
