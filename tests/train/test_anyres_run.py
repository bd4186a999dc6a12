"""Stages on images of any size: the newline trains, is saved with the connector, resumes and is opened again."""

import json
from pathlib import Path

import pytest
import torch
from conftest import draw_image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava_lite.commands.plan import main as plan
from llava_lite.inference import load, reply
from llava_lite.train.train import train

ANYRES = ["--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad"]
NEWLINE = "model.image_newline"
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


@pytest.fixture
def sized_data(toy_data, tmp_path):
    """Return data as of the toys whose images have ten sizes."""
    path, directory = toy_data(tmp_path / "sized")
    for i, name in enumerate(sorted(Path(directory).iterdir())):
        draw_image(i, 96).resize((20 + 37 * i % 90, 20 + 61 * i % 110)).save(name)
    return path, directory


@pytest.fixture
def caption_data(sized_data, tmp_path):
    """Return those of them that have an image, one question each."""
    records = [record for record in json.loads(Path(sized_data[0]).read_text()) if "image" in record]
    for record in records:
        record["conversations"] = record["conversations"][:2]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(records))
    return str(path), sized_data[1]


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_stages_of_llava_1_6_end_in_a_model_that_answers(run_stage, caption_data, sized_data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trainer = run_stage("projector", one, *ANYRES, "--num_train_epochs", 2, data=caption_data)
    trained = {id(param) for group in trainer.groups for param in group.parameters}
    assert NEWLINE in [name for name, param in trainer.model.named_parameters() if id(param) in trained]
    assert losses(one)[-1] < losses(one)[0]
    connector = torch.load(one / "mm_projector.bin", weights_only=True)
    assert torch.equal(connector[NEWLINE], load_file(one / "trained.safetensors")[NEWLINE])

    adapter = ["--pretrain_mm_mlp_adapter", one / "mm_projector.bin", "--num_eval_generations", 2]
    evaluated = ["--eval_split", 4, "--eval_strategy", "epoch", "--num_train_epochs", 2]
    run_stage("full", two, *ANYRES, *adapter, *evaluated, data=sized_data)
    assert losses(two)[-1] < losses(two)[0]
    weights = load_file(two / "model.safetensors")
    assert torch.equal(weights[NEWLINE], torch.load(two / "mm_projector.bin", weights_only=True)[NEWLINE])
    assert not torch.equal(weights[NEWLINE], connector[NEWLINE])
    config = json.loads((two / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    assert config["image_grid_pinpoints"] == PINPOINTS
    for directory in (one, two):
        model, processor = load(directory, device="cpu")
        assert torch.equal(model.state_dict()[NEWLINE], load_file(directory / NAMES[directory.name])[NEWLINE])
        images = [draw_image(1).resize((90, 20)), draw_image(2).resize((30, 60))]
        answers = reply(model, processor, ["What is it?"] * 2, images, max_new_tokens=4)
        assert answers == [reply(model, processor, "What is it?", image, max_new_tokens=4) for image in images]


NAMES = {"one": "trained.safetensors", "two": "model.safetensors"}


def test_a_stage_resumes_bit_for_bit(run_stage, caption_data, tmp_path):
    flags = [*ANYRES, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1]
    full = run_stage("projector", tmp_path / "full", *flags, data=caption_data)
    broken = tmp_path / "broken"
    (tmp_path / "full/checkpoint-3").rename(tmp_path / "kept")
    broken.mkdir()
    (tmp_path / "kept").rename(broken / "checkpoint-3")
    again = run_stage("projector", broken, *flags, data=caption_data)
    assert losses(broken)[-3:] == losses(tmp_path / "full")[-3:]
    for name, weight in full.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_a_lora_directory_holds_the_newline_for_llavas_own_loader(run_stage, sized_data, tmp_path):
    run_stage("lora", tmp_path / "lora", *ANYRES, "--max_steps", 2, data=sized_data)
    saved = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    assert f"base_model.model.{NEWLINE}" in saved
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert torch.equal(model.state_dict()[NEWLINE], saved[f"base_model.model.{NEWLINE}"])


def test_a_checkpoint_of_one_crop_trains_on_many(run_stage, sized_data, caption_data, tmp_path):
    run_stage("full", tmp_path / "flat", "--max_steps", 1, data=sized_data)
    run_stage("projector", tmp_path / "flat_connector", "--max_steps", 1, data=caption_data)
    many = run_stage("full", tmp_path / "many", *ANYRES, "--max_steps", 1, data=sized_data, model=tmp_path / "flat")
    width = many.model.config.hidden_size
    assert 0.3 < float(many.model.model.image_newline.detach().std()) * width**0.5 < 2
    adapter = ["--pretrain_mm_mlp_adapter", tmp_path / "flat_connector/mm_projector.bin"]
    run_stage("full", tmp_path / "third", *ANYRES, *adapter, "--max_steps", 1, data=sized_data)
    # And further without saying so again.
    again = run_stage("full", tmp_path / "again", "--max_steps", 1, data=sized_data, model=tmp_path / "many")
    assert again.model.config.mm_patch_merge_type == "spatial_unpad"


def test_what_cannot_be_cut_is_refused_before_weights_are_read(stage_flags, caption_data, tmp_path):
    flags = [*ANYRES, "--image_grid_pinpoints", "[(48, 32)]"]
    with pytest.raises(ValueError, match=r"\[\(48, 32\)\] are not multiples of the 32 pixels that the tower reads"):
        train(stage_flags("projector", tmp_path / "out", *flags, data=caption_data))
    with_class_token = [*ANYRES, "--mm_vision_select_feature", "cls_patch"]
    with pytest.raises(ValueError, match="the tower gives 17 features; mm_vision_select_feature must be 'patch'"):
        train(stage_flags("projector", tmp_path / "out", *with_class_token, data=caption_data))


def test_the_plan_knows_the_longest_image(stage_flags, tmp_path, capsys, caplog, caption_data):
    # 16 features of the full image, 8 rows of 8 patches and a newline.
    plan(stage_flags("projector", tmp_path / "out", *ANYRES))
    out = capsys.readouterr().out
    assert "an image is up to 88 tokens" in out
    assert "refused" not in out
    plan(stage_flags("projector", tmp_path / "out", *ANYRES, "--model_max_length", 80))
    out = capsys.readouterr().out
    assert "up to 88 tokens: more than --model_max_length 80; records with such an image are bad records" in out
    plan(stage_flags("projector", tmp_path / "out"))
    assert "an image is 16 tokens" in capsys.readouterr().out
    caplog.set_level("INFO", logger="llava_lite")
    train(stage_flags("projector", tmp_path / "run", *ANYRES, "--max_steps", 1, data=caption_data))
    assert "an image is up to 88 tokens" in caplog.text
