"""A base's generation_config.json, inconsistent or broken, is read and saved; only what is refused goes, reported."""

import json
import shutil

import pytest
import torch
from conftest import llm_config
from transformers import AutoModelForCausalLM, GenerationConfig

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.export.convert import convert
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.assemble import assemble
from llava_lite.model.generation_config import read_generation_config, savable, savable_view
from llava_lite.train.saving.final import save_final

# As Vicuna's, whose temperature has no do_sample beside it.
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
VICUNA = IDS | {"temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
# Fields beside IDS -> those of them that a saved file lacks.
REFUSED = [
    ({"temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
    ({"do_sample": False, "temperature": 0.7, "top_k": 20}, {"temperature", "top_k"}),
    ({"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}, set()),
    ({"typical_p": 0.9, "min_p": 0.1}, {"typical_p", "min_p"}),
    ({"epsilon_cutoff": 1e-3, "eta_cutoff": 2e-3}, {"epsilon_cutoff", "eta_cutoff"}),
    ({"penalty_alpha": 0.6, "top_k": 4}, {"top_k"}),
    ({"num_beams": 1, "length_penalty": 1.2, "early_stopping": True}, {"length_penalty", "early_stopping"}),
    ({"num_beams": 3, "length_penalty": 1.2, "early_stopping": True}, set()),
    ({"num_beams": 3, "num_return_sequences": 5}, {"num_return_sequences"}),
    ({"num_return_sequences": 3}, {"num_return_sequences"}),
    ({"early_stopping": "soon"}, {"early_stopping"}),
    ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
    ({"cache_implementation": "no_such_cache"}, {"cache_implementation"}),
    ({"output_scores": True}, {"output_scores"}),
    ({"max_new_tokens": 0}, {"max_new_tokens"}),
    ({"suppress_tokens": [2], "forced_eos_token_id": 2}, {"forced_eos_token_id"}),
    ({"suppress_tokens": 5}, {"suppress_tokens"}),
    ({"compile_config": {"fullgraph": True}}, {"compile_config"}),
    ({"streamer": "x"}, {"streamer"}),
    ({"validate": True}, {"validate"}),
    ({"use_cache": "perhaps"}, {"use_cache"}),
    ({"temperature": [0.9]}, {"temperature"}),
    ({"a_field_of_another_program": {"x": 1}}, set()),
    ({"watermarking_config": {"greenlist_ratio": 0.25}}, set()),
]


def write_config(directory, fields):
    (directory / "generation_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))


@pytest.fixture
def base(toy_llm_dir, tmp_path):
    """Return a function: fields of generation_config.json -> directory of a plain language model with them."""

    def make(fields):
        directory = shutil.copytree(toy_llm_dir("llama"), tmp_path / "base")
        write_config(directory, fields)
        return directory

    return make


def saved_fields(directory):
    return json.loads((directory / "generation_config.json").read_text())


@pytest.mark.parametrize(("extra", "gone"), REFUSED, ids=lambda value: "-".join(map(str, sorted(value))))
def test_only_what_transformers_refuses_goes_and_the_rest_is_saved(base, toy_tower_dir, tmp_path, caplog, extra, gone):
    model = assemble(str(base(IDS | extra)), str(toy_tower_dir()), dtype=torch.float32)
    # As a run does; a config that is unchanged since it was read is saved as it is by some versions of transformers.
    model.generation_config.pad_token_id = 7
    model.save_pretrained(tmp_path / "out")
    saved = saved_fields(tmp_path / "out")
    wanted = {name: value for name, value in (IDS | extra | {"pad_token_id": 7}).items() if name not in gone}
    if "watermarking_config" in extra:
        assert (
            saved.pop("watermarking_config")["greenlist_ratio"] == wanted.pop("watermarking_config")["greenlist_ratio"]
        )
    assert {name: value for name, value in saved.items() if name != "transformers_version"} == wanted
    lines = [line for line in caplog.messages if "generation_config.json" in line]
    assert len(lines) == bool(gone)
    assert all(name in lines[0] for name in gone)
    GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)


@pytest.mark.parametrize(
    ("field", "written", "meant"),
    [
        ("temperature", "0.9", 0.9),
        ("max_new_tokens", "512", 512),
        ("max_length", 4096.0, 4096),
        ("do_sample", "true", True),
        ("do_sample", "False", False),
        ("pad_token_id", "0", 0),
    ],
)
def test_a_value_of_another_type_is_read_as_what_it_says(tmp_path, caplog, field, written, meant):
    write_config(tmp_path, {"do_sample": True, field: written})
    read = read_generation_config(Checkpoint(tmp_path), llm_config("llama", 100))
    assert getattr(read, field) == meant
    assert type(getattr(read, field)) is type(meant)
    assert f"{field} {meant!r} in place of {written!r}" in caplog.text


def test_a_token_id_that_is_no_number_comes_from_config_json(tmp_path, caplog):
    write_config(tmp_path, IDS | {"eos_token_id": "</s>"})
    read = read_generation_config(Checkpoint(tmp_path), llm_config("llama", 100))
    assert (read.eos_token_id, read.max_length) == (2, 4096)
    assert "eos_token_id '</s>' (expected int or list)" in caplog.text


@pytest.mark.parametrize(
    ("text", "output"), [("{", "is no JSON"), ("[1]", "a list and no fields"), ("null", "a NoneType and no fields")]
)
def test_a_file_without_fields_is_reported_and_config_json_counts(base, toy_tower_dir, caplog, text, output):
    model = assemble(str(base(text)), str(toy_tower_dir()), dtype=torch.float32)
    assert model.generation_config.eos_token_id == 2
    assert output in caplog.text


def test_fields_about_generating_in_config_json_do_not_stop_a_load(base, toy_tower_dir, tmp_path, caplog):
    directory = base({})
    (directory / "generation_config.json").unlink()
    fields = json.loads((directory / "config.json").read_text()) | {"num_return_sequences": 3, "max_length": 99}
    (directory / "config.json").write_text(json.dumps(fields))
    model = assemble(str(directory), str(toy_tower_dir()), dtype=torch.float32)
    assert (model.generation_config.num_return_sequences, model.generation_config.max_length) == (None, 99)
    assert "config.json" in caplog.text
    model.save_pretrained(tmp_path / "out")
    assert saved_fields(tmp_path / "out")["max_length"] == 99


def test_a_good_config_is_the_same_object_and_nothing_is_reported(caplog):
    config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 5])
    assert savable(config) == (config, "")
    assert savable(config)[0] is config
    assert not caplog.messages


def test_a_save_leaves_the_model_as_it_is(toy_model, tmp_path):
    model = toy_model()
    model.generation_config.temperature = 0.9
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.generation_config.temperature == 0.9
    assert model.config.to_dict() == before
    assert "temperature" not in saved_fields(tmp_path)


def test_a_plain_language_model_is_saved_too(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base(VICUNA))
    model.generation_config.pad_token_id = 7
    savable_view(model).save_pretrained(tmp_path / "out")
    assert saved_fields(tmp_path / "out").keys() - {"transformers_version"} == IDS.keys()


@pytest.mark.parametrize("full", [False, True])
def test_the_final_directory_of_a_stage_is_written(base, toy_tower_dir, tmp_path, caplog, full):
    directory = base(VICUNA)
    model = assemble(str(directory), str(toy_tower_dir()), dtype=torch.float32)
    model.generation_config.pad_token_id = 7
    save_final(model, tmp_path / "out", base=str(directory), full=full, conv_template="v1")
    assert saved_fields(tmp_path / "out").keys() - {"transformers_version"} == IDS.keys()
    assert caplog.text.count("without temperature 0.9, top_p 0.6 (needs do_sample=True)") == 1
    opened = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "out")
    # Of a part too: its base does not know the padding that it was trained with.
    assert opened.generation_config.pad_token_id == 7


@pytest.mark.parametrize("extra", [{"temperature": 0.9}, {"num_beams": 3, "num_return_sequences": 3}])
def test_convert_writes_both_ways_and_says_what_is_missing(toy_model, toy_tokenizer, toy_tower_dir, tmp_path, extra):
    model = toy_model(conv_template="v1")
    model.save_pretrained(tmp_path / "ours")
    toy_tokenizer.save_pretrained(tmp_path / "ours")
    write_config(tmp_path / "ours", IDS | extra)
    output = []
    convert(tmp_path / "ours", tmp_path / "theirs", report=output.append)
    assert saved_fields(tmp_path / "theirs")["max_length"] == 4096
    assert any("without temperature 0.9 (needs do_sample=True)" in line for line in output) == ("temperature" in extra)
    # transformers cannot read this one at all.
    write_config(tmp_path / "theirs", IDS | extra | {"early_stopping": "soon"})
    convert(tmp_path / "theirs", tmp_path / "back", report=output.append)
    saved = saved_fields(tmp_path / "back")
    assert saved["max_length"] == 4096
    assert saved.get("num_beams") == extra.get("num_beams")
    assert "temperature" not in saved
    assert "early_stopping" not in saved
