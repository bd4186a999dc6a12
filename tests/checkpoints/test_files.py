"""Weights files of a checkpoint: all found, all read, and what is broken or dangerous is named."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.files import read_checkpoint
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.model.builder import load_pretrained_model

STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2), "c": torch.zeros(1)}


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def write_shards(directory, ending, state=STATE):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-{number:05}-of-{len(state):05}.{ending}" for number, name in enumerate(state, 1)}
    for name, file in weight_map.items():
        part = {name: state[name]}
        save_file(part, directory / file) if ending == "safetensors" else torch.save(part, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return list(weight_map.values())


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_read_as_one(ending, tmp_path):
    write_shards(tmp_path, ending)
    found = read_checkpoint(Checkpoint(tmp_path))
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_shard_that_is_missing_is_named(ending, tmp_path):
    files = write_shards(tmp_path, ending)
    os.remove(tmp_path / files[1])
    with pytest.raises(OSError, match=rf"lacks 1 of the 3 files of weights.*'{files[1]}'"):
        read_checkpoint(Checkpoint(tmp_path))


def test_a_directory_without_weights_and_a_broken_index_say_so(tmp_path):
    with pytest.raises(OSError, match=r"holds no weights: no model\.safetensors and no pytorch_model\.bin"):
        read_checkpoint(Checkpoint(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json' is no index of weights"):
        read_checkpoint(Checkpoint(tmp_path))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks up what is mapped where Linux lists it")
def test_a_pickle_is_mapped_and_not_copied_and_an_old_one_is_read_too(tmp_path):
    large = {"w": torch.zeros(1000, 1000)}
    torch.save(large, tmp_path / "new.bin")
    torch.save(large, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name, is_mapped in (("new.bin", True), ("old.bin", False)):
        weights = read_weights(tmp_path / name)
        assert torch.equal(weights["w"], large["w"])
        with open("/proc/self/maps") as maps:
            assert (str(tmp_path / name) in maps.read()) == is_mapped


@pytest.mark.parametrize("old", [False, True], ids=["zip", "plain pickle"])
def test_a_pickle_with_code_in_it_is_not_opened(old, tmp_path):
    torch.save({"a": Attack(tmp_path / "attacked")}, tmp_path / "w.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"w\.bin' cannot be read as weights .*a pickle with code in it, .*open"):
        read_weights(tmp_path / "w.bin")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "output"),
    [
        (b"", "it is cut short after 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "Copy it again, or name the right file"),
    ],
    ids=["empty", "git-lfs", "html"],
)
@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_a_file_that_is_no_weights_says_what_it_is(content, output, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=output):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors"])
def test_an_index_that_leads_out_of_its_directory_is_refused(name, tmp_path):
    directory = tmp_path / "inside"
    directory.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    index = {"weight_map": {"w": name if name.startswith("..") else str(tmp_path / "w.safetensors")}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names weights outside its directory"):
        read_checkpoint(Checkpoint(directory))


def test_a_pickle_of_anything_but_named_tensors_is_refused(tmp_path):
    torch.save({"module": {"a": torch.ones(1)}, "b": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"holds more than named tensors: \['module'\]"):
        read_weights(tmp_path / "w.bin")


FILES = ("model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.99])
@pytest.mark.parametrize("model_type", ["llava_llama", "moe_llava_llama", "llama"])
def test_a_full_checkpoint_that_is_truncated_says_which_file(
    model_type, fraction, file, toy_model, toy_llm_dir, tmp_path
):
    directory = write_directory(model_type, file, toy_model, toy_llm_dir, tmp_path)
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ValueError, match=rf"{file}' cannot be read as weights \(.*it is cut short after \d+ bytes"):
        load_pretrained_model(directory, device="cpu")
    if model_type != "llama":
        with pytest.raises(ValueError, match=r"it is cut short after"):
            AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("model_type", ["llava_llama", "moe_llava_llama", "llama"])
def test_a_full_checkpoint_with_code_in_it_is_refused(model_type, toy_model, toy_llm_dir, tmp_path):
    directory = write_directory(model_type, "pytorch_model.bin", toy_model, toy_llm_dir, tmp_path)
    torch.save({"a": Attack(tmp_path / "attacked")}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a pickle with code in it, .*open"):
        load_pretrained_model(directory, device="cpu")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_plain_language_model_must_be_complete_too(file, toy_model, toy_llm_dir, tmp_path):
    """Left to itself, transformers draws what is missing at random, with a warning."""
    directory = write_directory("llama", file, toy_model, toy_llm_dir, tmp_path)
    state = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama")).state_dict()
    state["model.layers.9.mlp.up_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save(state, directory / file)
    with pytest.raises(ValueError, match=r"1 missing.*layers\.1\.mlp\.up_proj.*1 unexpected.*layers\.9\.mlp\.up_proj"):
        load_pretrained_model(directory, device="cpu")


def write_directory(model_type, file, toy_model, toy_llm_dir, tmp_path):
    """Write a full model of a type into one file; return the directory."""
    plain = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama"))
    model = plain if model_type == "llama" else toy_model()
    directory = tmp_path / "full"
    directory.mkdir()
    fields = model.config.to_dict() | {"model_type": model_type}
    (directory / "config.json").write_text(json.dumps(fields))
    AutoTokenizer.from_pretrained(toy_llm_dir("llama")).save_pretrained(directory)
    save(model.state_dict(), directory / file)
    return directory


def save(state, file):
    state = {name: weight.contiguous().clone() for name, weight in state.items()}
    save_file(state, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(state, file)
