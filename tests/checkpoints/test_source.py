"""A checkpoint is one object: its config.json is read once a load, and an error says in one sentence what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hub_client import asked, run_client
from packaging.version import Version

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.configuration import LlavaLlamaConfig
from llava_lite.formats import llava, moe_llava
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

ASKS_ONCE = Version(transformers.__version__) >= Version("5.23")
# Every opening of a file named config.json, by anybody in the process.
COUNT = """
import json, os, sys
opened = []
def note(event, arguments):
    if event == "open" and os.path.basename(str(arguments[0])) == "config.json":
        opened.append(os.path.basename(os.path.dirname(str(arguments[0]))))
import torch
from peft import LoraConfig
from llava_lite import LlavaLiteProcessor, load
sys.addaudithook(note)
"""


def count_openings(code):
    """Return {directory: how often its config.json was opened} while code ran in a process of its own."""
    command = f"{COUNT}{code}\nprint(json.dumps({{name: opened.count(name) for name in opened}}))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def complete(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """A complete model with its processor, as training writes it."""
    model = toy_model(conv_template="v1")
    model.save_pretrained(tmp_path / "complete")
    images = load_image_processor(toy_tower_dir("clip"))
    LlavaLiteProcessor.from_config(model.config, toy_tokenizer, images).save_pretrained(tmp_path / "complete")
    return tmp_path / "complete"


@pytest.fixture
def lora(toy_llm_dir, toy_tower_dir, tmp_path):
    """What LLaVA's LoRA stage writes: an adapter, and a config.json that names tower and base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, tower = str(toy_llm_dir("llama")), str(toy_tower_dir("clip"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = plain.config.to_dict() | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": tower,
        "mm_hidden_size": 32,
        "mm_projector_type": "linear",
        "base_model_name_or_path": base,
    }
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").write_text(json.dumps(fields))
    width = plain.config.hidden_size
    weights = {"weight": torch.zeros(width, 32), "bias": torch.zeros(width)}
    torch.save({f"model.mm_projector.{k}": v for k, v in weights.items()}, tmp_path / "lora" / "mm_projector.bin")
    return tmp_path / "lora"


def test_config_json_of_a_complete_directory_is_opened_once_a_load(complete, toy_llm_dir):
    assert count_openings(f'load({str(complete)!r}, device="cpu")') == {"complete": 1}
    assert count_openings(f"LlavaLiteProcessor.from_pretrained({str(complete)!r})") == {"complete": 1}
    plain = toy_llm_dir("llama")
    assert count_openings(f'load({str(plain)!r}, device="cpu")') == {Path(plain).name: 1}


def test_config_json_of_a_lora_and_its_base_is_opened_once_a_load(lora, toy_llm_dir, toy_tower_dir):
    base, tower = Path(toy_llm_dir("llama")).name, Path(toy_tower_dir("clip")).name
    # That of a tower is read within bounds first, and then by transformers.
    assert count_openings(f'load({str(lora)!r}, device="cpu")') == {"lora": 1, base: 1, tower: 2}


def test_config_json_of_a_repository_is_requested_once_a_load(hub, complete, tmp_path):
    upload = f"""
        from huggingface_hub import HfApi
        HfApi().create_repo("tester/once")
        HfApi().upload_folder(repo_id="tester/once", folder_path={str(complete)!r})
        """
    run_client(hub, tmp_path / "home", upload, start="")
    for num_fetched in (1, 0):
        before = len(asked(hub))
        run_client(hub, tmp_path / "other", 'load("tester/once", device="cpu")')
        requests = [(method, path) for method, path, _ in asked(hub)[before:] if path.endswith("/config.json")]
        # The first load fetches the file; a later one asks whether it has changed. transformers 5.17 asks once more.
        methods = [method for method, _ in requests]
        assert methods.count("GET") == num_fetched
        assert methods.count("HEAD") in ((1,) if ASKS_ONCE else (1, 2))


def test_a_checkpoint_answers_for_its_config_its_format_and_its_files(complete, tmp_path):
    checkpoint = Checkpoint(complete)
    assert isinstance(checkpoint.config, LlavaLlamaConfig)
    assert checkpoint.fields["conv_template"] == checkpoint.config.conv_template == "v1"
    assert (checkpoint.format, checkpoint.base) == (None, None)
    assert checkpoint.file("config.json") == os.path.join(complete, "config.json")
    assert checkpoint.file("adapter_config.json") is None
    assert "lm_head.weight" in checkpoint.weights()
    for fields, format in (({"model_type": "llava"}, llava), ({"model_type": "moe_llava_phi"}, moe_llava)):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert Checkpoint(tmp_path).format is format


def test_a_base_is_the_one_given_else_the_one_named_else_the_adapters(complete, lora, toy_llm_dir):
    named = str(toy_llm_dir("llama"))
    assert Checkpoint(lora).base.path == named
    assert Checkpoint(lora, base=complete).base.path == str(complete)
    fields = json.loads((lora / "config.json").read_text())
    del fields["base_model_name_or_path"]
    (lora / "config.json").write_text(json.dumps(fields))
    assert Checkpoint(lora).base.path == named
    (lora / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds only what was trained \(mm_projector.bin, adapter_model.*names no base"
    ):
        _ = Checkpoint(lora).base


def test_a_directory_without_config_json_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=r"is no checkpoint: it has no config.json\."):
        _ = Checkpoint(tmp_path).config
