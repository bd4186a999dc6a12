"""merge: what was trained and its base in one directory, measured against W + scale * B A written out here."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llava_lite.export import verify
from llava_lite.export.merge import merge
from llava_lite.inference import load
from llava_lite.mm_utils import process_images, tokenizer_image_token

peft = pytest.importorskip("peft", reason="LoRA directories are written and merged with peft")
NAMED = "base_model_name_or_path"
RANK, ALPHA = 4, 8
TARGETS = r"model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"


def lora_model(model):
    """Return the model with a LoRA of large random values on some of its layers."""
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return tuned.eval()


def projector_of(model, prefix=""):
    return {prefix + k: v.detach().clone() for k, v in model.state_dict().items() if "mm_projector" in k}


def merged_by_hand(tuned):
    """Return the plain model's weights with each update added: alpha / rank * B A."""
    state, wanted = tuned.state_dict(), {}
    for name, weight in state.items():
        if "lora_" in name:
            continue
        if ".base_layer." in name:
            low, up = (state[name.replace("base_layer", f"lora_{side}.default")] for side in "AB")
            weight = weight + ALPHA / RANK * up @ low
        wanted[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = weight
    return wanted


def partial_config(model, base):
    return model.config.to_dict() | {
        "base_model_name_or_path": base,
        "vision_config": None,
        "architectures": [type(model).__name__],
    }


@pytest.fixture
def lora_directory(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    """Return a function: "ours" or "llava" -> (LoRA directory as that one writes it, the weights it stands for)."""

    def make(writer="ours", named=True):
        model = toy_model(conv_template="v1")
        directory, base = tmp_path / "lora", str(toy_llm_dir("llama"))
        config, projector = partial_config(model, base if named else None), projector_of(model)
        tuned = lora_model(model)
        tuned.save_pretrained(directory)
        adapter = json.loads((directory / "adapter_config.json").read_text()) | {NAMED: base}
        (directory / "adapter_config.json").write_text(json.dumps(adapter if named else adapter | {NAMED: None}))
        if writer == "ours":
            save_file(projector, directory / "trained.safetensors")
            toy_tokenizer.save_pretrained(directory)
        else:
            others = {f"base_model.model.{name}": weight for name, weight in projector.items()}
            torch.save(others, directory / "non_lora_trainables.bin")
            config.pop("base_model_name_or_path")
        (directory / "config.json").write_text(json.dumps(config))
        return directory, merged_by_hand(tuned)

    return make


@pytest.mark.parametrize("writer", ["ours", "llava"])
def test_merged_weights_are_the_base_plus_the_update(lora_directory, tmp_path, writer):
    directory, wanted = lora_directory(writer)
    output = []
    gap = merge(directory, tmp_path / "full", report=output.append)
    assert gap.logits == 0
    assert any(line.startswith("LoRA beside its base and merged: ") for line in output)
    found = load_file(tmp_path / "full" / "model.safetensors")
    assert {name for name in wanted if name not in found} == set()
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


def test_merged_directory_opens_alone_and_answers_as_the_adapter_did(lora_directory, toy_model, tmp_path):
    directory, wanted = lora_directory()
    tuned = toy_model(conv_template="v1")
    tuned.load_state_dict(wanted)
    merge(directory, tmp_path / "full", report=str)
    for path in directory.iterdir():
        path.unlink()
    model, processor = load(tmp_path / "full", device="cpu")
    assert model.config.base_model_name_or_path is None
    assert (model.config.conv_template, processor.conv_template) == ("v1", "v1")
    ids = tokenizer_image_token("USER: <image>\nHello! ASSISTANT:", processor.tokenizer, return_tensors="pt")[None]
    pixels = process_images([verify.draw(40, 30)], processor.image_processor, model.config)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, images=pixels).logits, tuned(ids, images=pixels).logits, atol=1e-5, rtol=1e-5
        )


def test_directory_of_a_trained_connector_becomes_a_full_model(toy_model, toy_llm_dir, tmp_path):
    model, directory = toy_model(), tmp_path / "stage1"
    directory.mkdir()
    torch.save(projector_of(model), directory / "mm_projector.bin")
    (directory / "config.json").write_text(json.dumps(partial_config(model, None)))
    gap = merge(directory, tmp_path / "full", base=str(toy_llm_dir("llama")), report=str)
    assert gap.logits == 0
    found, wanted = load_file(tmp_path / "full" / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


CARD_OF_THE_RUN = """---
library_name: llava-lite
license: llama2
base_model: lmsys/vicuna-7b-v1.5
base_model_relation: adapter
datasets:
- liuhaotian/LLaVA-Instruct-150K
tags: [llava, lora]
---

# lora

- this directory holds what was trained; the base is opened with it

## Use

    model, processor = load("lora")

![loss](loss.png)

## Losses

| step | loss |

## Versions

| torch | 1 |
"""


def test_card_is_that_of_the_merged_model(lora_directory, toy_llm_dir, tmp_path):
    directory, _ = lora_directory()
    (directory / "README.md").write_text(CARD_OF_THE_RUN)
    merge(directory, tmp_path / "full", report=str)
    text = (tmp_path / "full" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "llava-lite",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "multimodal", "merged"],
        "license": "llama2",
        "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
        "base_model": "lmsys/vicuna-7b-v1.5",
        "base_model_relation": "finetune",
    }
    assert body.startswith("\n# full\n")
    assert f"`lora` and its base `{toy_llm_dir('llama').name}` as one model, written by `llava-lite merge`." in body
    assert f"- merged: LoRA of rank {RANK}, alpha {ALPHA}\n" in body
    assert "compared with its parts: prompt ids equal; largest pixel difference 0; largest logit difference 0;" in body
    assert 'load("full")' in body
    assert "## How `lora` was trained\n\n### Losses\n\n| step | loss |\n" in body
    for stale in ("loss.png", 'load("lora")', "holds what was trained", "Versions", str(tmp_path)):
        assert stale not in text


def test_card_of_parts_without_a_card_says_what_was_merged(toy_model, toy_llm_dir, tmp_path):
    directory = tmp_path / "stage1"
    directory.mkdir()
    torch.save(projector_of(toy_model()), directory / "mm_projector.bin")
    (directory / "config.json").write_text(json.dumps(partial_config(toy_model(), str(toy_llm_dir("llama")))))
    merge(directory, tmp_path / "full", report=str)
    text = (tmp_path / "full" / "README.md").read_text()
    assert "- merged: the weights that were trained\n" in text
    assert "was trained\n\n###" not in text


def test_half_precision_rounds_once_after_merging(lora_directory, tmp_path):
    directory, wanted = lora_directory()
    gap = merge(directory, tmp_path / "full", dtype="bfloat16", report=str)
    assert gap.logits == 0
    found = load_file(tmp_path / "full" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[name].dtype == torch.bfloat16
    # One step of bfloat16 where the float32 sums differ by their last bit.
    torch.testing.assert_close(found[name].float(), wanted[name], atol=0, rtol=2**-8)


def test_a_full_model_and_an_occupied_target_are_refused_with_reasons(
    toy_model, toy_tokenizer, lora_directory, tmp_path
):
    toy_model().save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a complete model already; there is nothing to merge"):
        merge(tmp_path / "model", tmp_path / "full", report=str)
    directory, _ = lora_directory()
    with pytest.raises(ValueError, match="is there already and not empty"):
        merge(directory, tmp_path / "model", report=str)
    with pytest.raises(OSError, match="there is no such directory"):
        merge(tmp_path / "absent", tmp_path / "full", report=str)


def test_base_that_nothing_names_is_asked_for(lora_directory, tmp_path):
    directory, _ = lora_directory(named=False)
    with pytest.raises(ValueError, match="names no base"):
        merge(directory, tmp_path / "full", report=str)


def test_update_that_is_not_the_adapters_own_fails_the_check(lora_directory, tmp_path, monkeypatch):
    directory, _ = lora_directory()
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * right(self, adapter))
    with pytest.raises(ValueError, match="merging changed the answers"):
        merge(directory, tmp_path / "full", report=str)
    assert not (tmp_path / "full").exists()


def test_llavas_own_flags_are_accepted(lora_directory, toy_llm_dir, tmp_path):
    directory, _ = lora_directory("llava", named=False)
    flags = ["--model-path", directory, "--model-base", toy_llm_dir("llama"), "--save-model-path", tmp_path / "full"]
    command = [sys.executable, "-m", "llava_lite.cli", "merge", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest logit difference" in done.stdout
    assert (tmp_path / "full" / "model.safetensors").is_file()
    bare = subprocess.run(command[:4], capture_output=True, text=True, timeout=240)
    assert bare.returncode == 2
    assert "SOURCE (or --model-path) is needed" in bare.stderr


def test_adapter_of_a_plain_language_model_is_merged_too(toy_llm_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    base = str(toy_llm_dir("llama"))
    tuned = lora_model(AutoModelForCausalLM.from_pretrained(base))
    tuned.save_pretrained(tmp_path / "lora")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = tuned(ids).logits
    assert merge(tmp_path / "lora", tmp_path / "full", base=base, report=str).logits == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_a_model_of_transformers_becomes_a_full_one_of_ours(toy_model, toy_tokenizer, tmp_path):
    from llava_lite.export.convert import convert

    model = toy_model(conv_template="v1")
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "hf", report=str)
    begun, processor = load(tmp_path / "hf", device="cpu")
    tuned = lora_model(begun)
    tuned.save_pretrained(tmp_path / "tuned")
    config = begun.config.to_dict() | {NAMED: str(tmp_path / "hf")}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    wanted = merged_by_hand(tuned)
    assert merge(tmp_path / "tuned", tmp_path / "full", report=str).logits == 0
    found = load_file(tmp_path / "full" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)
    _, again = load(tmp_path / "full", device="cpu")
    assert (again.conv_template, again.image_token_index) == ("v1", processor.image_token_index)


def test_a_base_with_an_invalid_generation_config_is_merged(lora_directory, toy_llm_dir, tmp_path, caplog):
    base = shutil.copytree(toy_llm_dir("llama"), tmp_path / "base")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
    (base / "generation_config.json").write_text(json.dumps(ids | {"temperature": 0.9, "num_return_sequences": 3}))
    directory, _ = lora_directory()
    merge(directory, tmp_path / "full", base=str(base), report=str)
    saved = json.loads((tmp_path / "full" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in (*ids, "temperature")} == ids | {"temperature": None}
    assert "without temperature 0.9 (needs do_sample=True)" in caplog.text
