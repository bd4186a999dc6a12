"""The directory that a stage leaves is opened as the model that was trained, full or on its base."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.builder import load_pretrained_model
from llava_lite.train.arguments.fields import ModelArguments, TrainingArguments
from llava_lite.train.build import fit_vocabulary
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.final import save_final
from llava_lite.train.tuning import choose_what_trains

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2}


@pytest.fixture
def trained(toy_model, tmp_path):
    """Return a function: tuning -> a model whose trained weights are no longer those of its base."""

    def make(tuning, **model_keys):
        args = TrainingArguments(output_dir=str(tmp_path / "unused"), tuning=tuning, lora_r=4, use_cpu=True)
        model = toy_model("llama", moe=MOE if tuning == "moe" else None, **model_keys)
        model = choose_what_trains(model, ModelArguments(), args).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(torch.randn(param.shape, generator=generator) * 0.05)
        return model

    return make


@torch.no_grad()
def logits_of(model):
    """Return the logits of a text with an image in it."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 60, (1, 9), generator=generator)
    ids[0, 3] = -200
    return model(input_ids=ids, images=torch.randn(1, 3, 32, 32, generator=generator)).logits


def test_a_projector_directory_is_small_and_opens_on_its_base(trained, toy_llm_dir, tmp_path):
    model = trained("projector")
    save_final(model, tmp_path, base=str(toy_llm_dir("llama")), conv_template="plain", card="# A card")
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "config.json",
        "final_files.json",
        "generation_config.json",
        "mm_projector.bin",
        "trained.safetensors",
    ]
    assert set(load_file(tmp_path / "trained.safetensors")) == {
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    opened = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))
    assert opened.config.conv_template == "plain"


def test_mm_projector_bin_is_what_llava_reads(trained, tmp_path):
    model = trained("full")
    save_final(model, tmp_path, full=True)
    saved = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    own = {f"model.mm_projector.{name}": w for name, w in model.model.mm_projector.state_dict().items()}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)


@pytest.mark.parametrize("tuning", ["full", "moe"])
def test_a_full_checkpoint_needs_no_base(trained, toy_llm_dir, tmp_path, tuning):
    model = trained(tuning)
    save_final(model, tmp_path / "out", full=True, base=str(toy_llm_dir("llama")), conv_template="v1")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_name_or_path"] is None
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(opened) is LlavaLlamaForCausalLM
    assert torch.equal(logits_of(opened), logits_of(model))


def test_a_lora_directory_opens_on_its_base(trained, toy_llm_dir, tmp_path):
    model = trained("lora")
    save_final(model, tmp_path, base=str(toy_llm_dir("llama")))
    names = set(os.listdir(tmp_path))
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector.bin"}
    llava_names = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True).keys()
    assert all(name.startswith("base_model.model.model.mm_projector.") for name in llava_names)
    opened = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    # Merging the update into the weight rounds otherwise than adding two matmuls.
    assert torch.allclose(logits_of(opened), logits_of(model), atol=1e-4)
    assert not torch.allclose(logits_of(opened), logits_of(trained("projector")), atol=1e-2)


def test_a_full_checkpoint_of_lora_has_the_update_merged(trained, tmp_path):
    model = trained("lora")
    save_final(model, tmp_path, full=True)
    assert not list(tmp_path.glob("adapter*"))
    assert torch.allclose(logits_of(LlavaLlamaForCausalLM.from_pretrained(tmp_path)), logits_of(model), atol=1e-4)


def test_tied_embeddings_are_saved_once_and_opened_tied(trained, tmp_path):
    model = trained("full")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_final(model, tmp_path, full=True)
    opened = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))


def test_a_second_run_leaves_nothing_of_the_first(trained, toy_llm_dir, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    save_final(trained("full"), tmp_path, full=True)
    model = trained("projector")
    save_final(model, tmp_path, base=str(toy_llm_dir("llama")))
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert torch.equal(logits_of(LlavaLlamaForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_every_file_can_be_read_by_whom_the_config_can(trained, tmp_path):
    save_final(trained("full"), tmp_path, full=True)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_without_room_the_earlier_directory_stays_as_it_was(trained, tmp_path, monkeypatch):
    before = trained("full")
    save_final(before, tmp_path, full=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(paper.shutil, "disk_usage", lambda path: usage._replace(free=1234))
    with pytest.raises(paper.SaveError, match=r"[\d,]+ bytes are needed, 1,234 are free.*there is no checkpoint-N"):
        save_final(trained("moe"), tmp_path, full=True)
    assert not (tmp_path / "tmp-final").exists()
    assert torch.equal(logits_of(LlavaLlamaForCausalLM.from_pretrained(tmp_path)), logits_of(before))


def test_there_is_no_config_while_other_files_are_still_moved(trained, tmp_path, monkeypatch):
    save_final(trained("full"), tmp_path, full=True)
    replace, had_config = os.replace, []

    def noted(source, target):
        if Path(target).parent == tmp_path:
            had_config.append((tmp_path / "config.json").exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    save_final(trained("moe"), tmp_path, full=True)
    assert len(had_config) > 2
    assert not any(had_config)
    assert (tmp_path / "config.json").exists()


def test_a_partial_directory_must_name_its_base(trained, tmp_path):
    with pytest.raises(ValueError, match="must name its base"):
        save_final(trained("projector"), tmp_path)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_directory_with_more_words_than_its_base_reopens(
    tuning, toy_model, toy_tokenizer, toy_llm_dir, tmp_path, caplog, monkeypatch
):
    """With --mm_use_im_start_end; LoRA leaves the new vocabulary rows as they were drawn, the mean of the others."""
    model = toy_model("llama", mm_use_im_start_end=True)
    fit_vocabulary(model, toy_tokenizer)
    args = TrainingArguments(output_dir=str(tmp_path / "unused"), tuning=tuning, lora_r=4, use_cpu=True)
    tuned = choose_what_trains(model, ModelArguments(), args).eval()
    with torch.no_grad():
        for param in tuned.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.05)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        save_final(tuned, tmp_path / "x91", parts=[toy_tokenizer], base=str(toy_llm_dir("llama")))
    assert "to instantiate a model of type" not in caplog.text
    ids = torch.tensor([[1, 50, len(toy_tokenizer) - 2, -200, len(toy_tokenizer) - 1, 60]])
    pixels = torch.randn(1, 3, 32, 32)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "x91"),
        load_pretrained_model(tmp_path / "x91", device="cpu")[1],
    ):
        with torch.no_grad():
            torch.testing.assert_close(again(ids, images=pixels).logits, tuned(ids, images=pixels).logits)
