"""merge: what was trained and its base in one folder, measured against W + scale * B A written out here."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llava_lite.export import witness
from llava_lite.export.merge import merge
from llava_lite.inference import load
from llava_lite.mm_utils import process_images, tokenizer_image_token

peft = pytest.importorskip("peft", reason="LoRA folders are written and folded with peft")
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


def folded_by_hand(tuned):
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
def lora_folder(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    """Return a function: "ours" or "llava" -> (LoRA folder as that one writes it, the weights it stands for)."""

    def make(writer="ours", named=True):
        model = toy_model(conv_template="v1")
        folder, base = tmp_path / "lora", str(toy_llm_dir("llama"))
        config, projector = partial_config(model, base if named else None), projector_of(model)
        tuned = lora_model(model)
        tuned.save_pretrained(folder)
        adapter = json.loads((folder / "adapter_config.json").read_text()) | {NAMED: base}
        (folder / "adapter_config.json").write_text(json.dumps(adapter if named else adapter | {NAMED: None}))
        if writer == "ours":
            save_file(projector, folder / "trained.safetensors")
            toy_tokenizer.save_pretrained(folder)
        else:
            others = {f"base_model.model.{name}": weight for name, weight in projector.items()}
            torch.save(others, folder / "non_lora_trainables.bin")
            config.pop("base_model_name_or_path")
        (folder / "config.json").write_text(json.dumps(config))
        return folder, folded_by_hand(tuned)

    return make


@pytest.mark.parametrize("writer", ["ours", "llava"])
def test_merged_weights_are_the_base_plus_the_update(lora_folder, tmp_path, writer):
    folder, wanted = lora_folder(writer)
    said = []
    gap = merge(folder, tmp_path / "whole", say=said.append)
    assert gap.logits == 0
    assert any(line.startswith("LoRA beside its base and folded in: ") for line in said)
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert {name for name in wanted if name not in found} == set()
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


def test_merged_folder_opens_alone_and_says_what_the_adapter_said(lora_folder, toy_model, tmp_path):
    folder, wanted = lora_folder()
    tuned = toy_model(conv_template="v1")
    tuned.load_state_dict(wanted)
    merge(folder, tmp_path / "whole", say=str)
    for path in folder.iterdir():
        path.unlink()
    model, processor = load(tmp_path / "whole", device="cpu")
    assert model.config.base_model_name_or_path is None
    assert (model.config.conv_template, processor.conv_template) == ("v1", "v1")
    ids = tokenizer_image_token("USER: <image>\nHello! ASSISTANT:", processor.tokenizer, return_tensors="pt")[None]
    pixels = process_images([witness.draw(40, 30)], processor.image_processor, model.config)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, images=pixels).logits, tuned(ids, images=pixels).logits, atol=1e-5, rtol=1e-5
        )


def test_folder_of_a_trained_connector_becomes_whole(toy_model, toy_llm_dir, tmp_path):
    model, folder = toy_model(), tmp_path / "stage1"
    folder.mkdir()
    torch.save(projector_of(model), folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(partial_config(model, None)))
    gap = merge(folder, tmp_path / "whole", base=str(toy_llm_dir("llama")), say=str)
    assert gap.logits == 0
    found, wanted = load_file(tmp_path / "whole" / "model.safetensors"), model.state_dict()
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

- this folder holds what was trained; the base is opened with it

## Use

    model, processor = load("lora")

![loss](loss.png)

## Losses

| step | loss |

## Versions

| torch | 1 |
"""


def test_card_is_that_of_the_merged_model(lora_folder, toy_llm_dir, tmp_path):
    folder, _ = lora_folder()
    (folder / "README.md").write_text(CARD_OF_THE_RUN)
    merge(folder, tmp_path / "whole", say=str)
    text = (tmp_path / "whole" / "README.md").read_text()
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
    assert body.startswith("\n# whole\n")
    assert f"`lora` and its base `{toy_llm_dir('llama').name}` as one model, written by `llava-lite merge`." in body
    assert f"- merged: LoRA of rank {RANK}, alpha {ALPHA}\n" in body
    assert "beside its parts: prompt ids equal; largest pixel difference 0; largest logit difference 0;" in body
    assert 'load("whole")' in body
    assert "## How `lora` was trained\n\n### Losses\n\n| step | loss |\n" in body
    for stale in ("loss.png", 'load("lora")', "holds what was trained", "Versions", str(tmp_path)):
        assert stale not in text


def test_card_of_parts_without_a_card_says_what_was_merged(toy_model, toy_llm_dir, tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    torch.save(projector_of(toy_model()), folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(partial_config(toy_model(), str(toy_llm_dir("llama")))))
    merge(folder, tmp_path / "whole", say=str)
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "- merged: the weights that were trained\n" in text
    assert "was trained\n\n###" not in text


def test_half_precision_rounds_once_after_folding(lora_folder, tmp_path):
    folder, wanted = lora_folder()
    gap = merge(folder, tmp_path / "whole", dtype="bfloat16", say=str)
    assert gap.logits == 0
    found = load_file(tmp_path / "whole" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[name].dtype == torch.bfloat16
    # One step of bfloat16 where the float32 sums differ by their last bit.
    torch.testing.assert_close(found[name].float(), wanted[name], atol=0, rtol=2**-8)


def test_whole_folder_and_full_target_are_refused_in_words(toy_model, toy_tokenizer, lora_folder, tmp_path):
    toy_model().save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a whole model already; there is nothing to merge"):
        merge(tmp_path / "model", tmp_path / "whole", say=str)
    folder, _ = lora_folder()
    with pytest.raises(ValueError, match="is there already and not empty"):
        merge(folder, tmp_path / "model", say=str)
    with pytest.raises(OSError, match="there is no such directory"):
        merge(tmp_path / "absent", tmp_path / "whole", say=str)


def test_base_that_nothing_names_is_asked_for(lora_folder, tmp_path):
    folder, _ = lora_folder(named=False)
    with pytest.raises(ValueError, match="names no base"):
        merge(folder, tmp_path / "whole", say=str)


def test_update_that_is_not_the_adapters_own_fails_the_check(lora_folder, tmp_path, monkeypatch):
    folder, _ = lora_folder()
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * right(self, adapter))
    with pytest.raises(ValueError, match="folding changed the answers"):
        merge(folder, tmp_path / "whole", say=str)
    assert not (tmp_path / "whole").exists()


def test_llavas_own_flags_are_accepted(lora_folder, toy_llm_dir, tmp_path):
    folder, _ = lora_folder("llava", named=False)
    flags = ["--model-path", folder, "--model-base", toy_llm_dir("llama"), "--save-model-path", tmp_path / "whole"]
    command = [sys.executable, "-m", "llava_lite.cli", "merge", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest logit difference" in done.stdout
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    bare = subprocess.run(command[:4], capture_output=True, text=True, timeout=240)
    assert bare.returncode == 2
    assert "SOURCE (or --model-path) is needed" in bare.stderr


def test_adapter_of_a_plain_language_model_is_folded_too(toy_llm_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    base = str(toy_llm_dir("llama"))
    tuned = lora_model(AutoModelForCausalLM.from_pretrained(base))
    tuned.save_pretrained(tmp_path / "lora")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = tuned(ids).logits
    assert merge(tmp_path / "lora", tmp_path / "whole", base=base, say=str).logits == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_a_model_of_transformers_becomes_a_whole_one_of_ours(toy_model, toy_tokenizer, tmp_path):
    from llava_lite.export.convert import convert

    model = toy_model(conv_template="v1")
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "stock", say=str)
    begun, processor = load(tmp_path / "stock", device="cpu")
    tuned = lora_model(begun)
    tuned.save_pretrained(tmp_path / "tuned")
    config = begun.config.to_dict() | {NAMED: str(tmp_path / "stock")}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    wanted = folded_by_hand(tuned)
    assert merge(tmp_path / "tuned", tmp_path / "whole", say=str).logits == 0
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)
    _, again = load(tmp_path / "whole", device="cpu")
    assert (again.conv_template, again.image_token_index) == ("v1", processor.image_token_index)


def test_a_base_whose_generation_config_contradicts_itself_is_merged(lora_folder, toy_llm_dir, tmp_path, caplog):
    base = shutil.copytree(toy_llm_dir("llama"), tmp_path / "base")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
    (base / "generation_config.json").write_text(json.dumps(ids | {"temperature": 0.9, "num_return_sequences": 3}))
    folder, _ = lora_folder()
    merge(folder, tmp_path / "whole", base=str(base), say=str)
    saved = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in (*ids, "temperature")} == ids | {"temperature": None}
    assert "without temperature 0.9 (needs do_sample=True)" in caplog.text
