"""A finished run that has lost a file of its model says so when it is started again, and makes it again exactly."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_lite.train.saving.final_files import FILES, find_damage, write_list
from llava_lite.train.train import main

EPOCH = ["--save_strategy", "epoch"]
# What a run writes about itself, and the card, whose times differ.
OF_THE_RUN = ("metrics.jsonl", "run.json", "report.html", "trainer_state.json", "README.md", "loss.png")


def files_of(directory):
    """Return {name: bytes} of the model's files in a finished directory."""
    return {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.is_file() and p.name not in OF_THE_RUN}


def delete(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def start(stage_flags, tmp_path, caplog, capsys):
    """Return a function that starts a run in `out` and returns its log, or the sentence with which it ended."""

    def run(stage, *flags):
        caplog.clear()
        try:
            with caplog.at_level(logging.INFO):
                main(stage_flags(stage, tmp_path / "out", *flags))
        except SystemExit as end:
            return f"code {end.code}: {capsys.readouterr().err}"
        return caplog.text

    return run


@pytest.mark.parametrize("stage", ["full", "lora", "moe"])
def test_a_model_that_is_missing_or_cut_is_made_again_exactly(start, tmp_path, stage):
    out = tmp_path / "out"
    start(stage, *EPOCH)
    written = files_of(out)
    weights = [name for name in written if name.endswith((".safetensors", ".bin"))]
    assert weights
    assert set(json.loads(written[FILES])) == {*written, "README.md"} - {FILES}
    harms = [(cut_in_half, name) for name in weights] + [(delete, name) for name in (weights[0], "tokenizer.json")]
    harms += [(cut, weights[-1]), (flip, weights[0]), (delete, "config.json"), (cut_in_half, "config.json")]
    for harm, name in harms:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        harm(out / name)
        output = start(stage, *EPOCH)
        assert f"{name} of the finished run in {out} " in output
        assert "It is made again from the last checkpoint; no step is taken." in output
        assert files_of(out) == written
        losses = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        assert losses == [line for line in lines if '"loss"' in line]
        assert "holds a finished run" in start(stage, *EPOCH)


@pytest.mark.parametrize("has_list", [True, False], ids=["today", "earlier version"])
@pytest.mark.parametrize("harm", [delete, cut])
def test_without_a_checkpoint_it_ends_with_what_to_do_and_trains_nothing(start, tmp_path, has_list, harm):
    out = tmp_path / "out"
    start("full", "--max_steps", "2")
    if not has_list:
        (out / FILES).unlink()
    harm(out / "model.safetensors")
    before = files_of(out)
    output = start("full", "--max_steps", "2")
    assert output.startswith("code 1: ")
    assert "model.safetensors" in output
    assert "There is no complete checkpoint-N to make it from: copy the file back, or train again" in output
    assert files_of(out) == before


def test_an_older_checkpoint_is_named_and_makes_it_again_if_that_is_asked_for(start, tmp_path):
    out, flags = tmp_path / "out", ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "3"]
    start("full", *flags)
    written = files_of(out)
    shutil.rmtree(out / "checkpoint-4")
    delete(out / "model.safetensors")
    asked = f"train the last 1 step again with --resume_from_checkpoint {out}/checkpoint-3"
    assert asked in start("full", *flags)
    assert not (out / "model.safetensors").exists()
    start("full", *flags, "--resume_from_checkpoint", out / "checkpoint-3")
    assert files_of(out) == written


def test_the_best_model_is_made_again_as_the_best(start, tmp_path):
    out, flags = tmp_path / "out", ["--eval_split", "4", "--eval_strategy", "epoch", "--num_train_epochs", "2"]
    # The loss falls, so the earlier model is the best of a run that wants a high one.
    flags += [*EPOCH, "--load_best_model_at_end", "True", "--metric_for_best_model", "loss"]
    flags += ["--greater_is_better", "True"]
    start("full", *flags)
    state, written = json.loads((out / "trainer_state.json").read_text()), files_of(out)
    assert state["best_global_step"] < state["global_step"]
    delete(out / "model.safetensors")
    assert "It is made again from the last checkpoint" in start("full", *flags)
    assert files_of(out) == written


# The directory alone.


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.ones(100)}, tmp_path / "mm_projector.bin")
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "merges.txt").write_text("a b\nc d\n")
    return tmp_path


@pytest.mark.parametrize("harm", [delete, cut, cut_in_half, flip])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mm_projector.bin", "merges.txt"])
def test_any_file_that_is_lost_or_changed_is_named(directory, name, harm):
    write_list(directory)
    assert find_damage(directory) is None
    harm(directory / name)
    assert find_damage(directory).startswith(f"{name} of the finished run in {directory} ")


@pytest.mark.parametrize("harm", [delete, cut])
def test_a_list_that_has_sizes_alone_is_compared_by_them(directory, harm):
    write_list(directory)
    sizes = {name: facts["size"] for name, facts in json.loads((directory / FILES).read_text()).items()}
    (directory / FILES).write_text(json.dumps(sizes))
    assert find_damage(directory) is None
    harm(directory / "merges.txt")
    assert find_damage(directory).startswith("merges.txt of the finished run")


@pytest.mark.parametrize("name", ["/etc/passwd", "../config.json", "a/../../b", "\udc80"])
def test_a_list_that_leads_out_of_its_directory_is_no_list(directory, name):
    (directory / FILES).write_text(json.dumps({name: {"size": 1, "sha256": "0" * 64}}))
    assert find_damage(directory) is None


def test_a_pipe_in_place_of_the_list_is_not_waited_for(directory):
    os.mkfifo(directory / FILES)
    assert find_damage(directory) is None


def test_what_a_person_edits_is_not_lost(directory):
    write_list(directory)
    (directory / "README.md").unlink()
    (directory / "config.json").write_text('{"model_type": "llava_llama", "conv_template": "v1"}')
    assert find_damage(directory) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"config.json": "1"}', '{"config.json": {}}', "[" * 100_000]
)
def test_a_list_that_is_damaged_itself_is_left_out(directory, content):
    (directory / FILES).write_text(content)
    assert find_damage(directory) is None
    cut(directory / "model.safetensors")
    assert "model.safetensors' cannot be read as weights" in find_damage(directory)


@pytest.mark.parametrize("harm", [delete, cut, cut_in_half])
def test_an_earlier_version_is_judged_by_its_weights(directory, harm):
    assert find_damage(directory) is None
    harm(directory / "model.safetensors")
    assert "model.safetensors" in find_damage(directory)


@pytest.mark.parametrize("harm", [delete, cut, cut_in_half])
def test_every_shard_of_an_earlier_version_is_looked_at(directory, harm):
    (directory / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.ones(10)}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert find_damage(directory) is None
    harm(directory / names["b"])
    assert names["b"] in find_damage(directory)


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (["trained.safetensors", "mm_projector.bin"], None),
        (["trained.safetensors", "adapter_config.json", "adapter_model.safetensors"], None),
        (["trained.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
        ([], "trained.safetensors"),
    ],
)
def test_trained_weights_of_an_earlier_version_are_looked_for(tmp_path, kept, lost):
    (tmp_path / "config.json").write_text('{"base_model_name_or_path": "/nowhere/base"}')
    for name in kept:
        if name.endswith(".json"):
            (tmp_path / name).write_text('{"peft_type": "LORA"}')
        else:
            (save_file if name.endswith("safetensors") else torch.save)({"w": torch.ones(10)}, tmp_path / name)
    assert find_damage(tmp_path) == (lost and f"{lost} of the finished run in {tmp_path} is missing.")
    for name in kept if lost is None else []:
        if not name.endswith(".json"):
            content = (tmp_path / name).read_bytes()
            cut(tmp_path / name)
            assert name in find_damage(tmp_path)
            (tmp_path / name).write_bytes(content)
