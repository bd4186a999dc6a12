"""A run's tokenizer and model, built from its flags."""

import sys
from types import SimpleNamespace

import pytest
import torch

from llava_lite.train.arguments.fields import ModelArguments
from llava_lite.train.build import build_tokenizer, fit_vocabulary, gather_experts_together, quantization


def test_tokenizer_without_a_pad_token_gets_one(toy_llm_dir):

    args = SimpleNamespace(cache_dir=None, model_max_length=77)
    tokenizer = build_tokenizer(ModelArguments(model_name_or_path=str(toy_llm_dir("llama"))), args)
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length) == ("<unk>", "right", 77)


def test_words_that_mark_images_begin_near_the_mean_of_all_others_each_elsewhere(toy_model, toy_tokenizer):
    toy_tokenizer.pad_token = toy_tokenizer.unk_token
    model = toy_model(mm_use_im_start_end=True)
    vocab_size = model.config.vocab_size
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    fit_vocabulary(model, toy_tokenizer)
    assert model.config.vocab_size == len(toy_tokenizer) == vocab_size + 2
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(layer.weight[:vocab_size], old)
        distance = (layer.weight[vocab_size:] - old.mean(0)) / old.std(0)
        # A tenth of the deviation of the vocabulary rows before them; of 64 draws none is five times its deviation.
        assert 0.05 < distance.std() < 0.15
        assert distance.abs().max() < 0.5
        assert not torch.equal(layer.weight[-1], layer.weight[-2])
    assert model.config.new_words == [vocab_size, vocab_size + 1]
    fit_vocabulary(model, toy_tokenizer)
    assert model.config.vocab_size == vocab_size + 2


@pytest.mark.parametrize("is_zero3", [True, False])
def test_zero3_partitions_the_experts_of_a_layer_as_one_whatever_the_json_says(is_zero3, toy_model, monkeypatch):
    from deepspeed.utils import get_z3_leaf_modules

    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: is_zero3)
    moe = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2}
    model, dense = toy_model(moe=moe), toy_model()
    for either in (model, dense):
        gather_experts_together(either)
    assert get_z3_leaf_modules(model) == (list(model.moe_layers().values()) if is_zero3 else [])
    assert get_z3_leaf_modules(dense) == []


def test_four_bits_without_bitsandbytes_are_refused(monkeypatch):

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantization(SimpleNamespace(bits=16)) == {}
    with pytest.raises(ImportError, match="--bits 4 needs bitsandbytes"):
        quantization(SimpleNamespace(bits=4))
