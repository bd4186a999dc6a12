"""The tiny language model that reads Alpaca's template."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from transformers import AutoTokenizer, LlamaForCausalLM

import playground.tiny
from llava_lite.conversation import alpaca_prompt
from playground.tiny import alpaca_llm

TINY = Path(playground.tiny.__file__).parent
PROMPT = alpaca_prompt("Which digit is top-left?")


def test_the_template_is_words_and_no_letters():
    few, many = (len(tokenizer(PROMPT).input_ids) for tokenizer in (alpaca_llm.alpaca_tokenizer(), old_tokenizer()))
    assert 2 * few < many
    assert alpaca_llm.alpaca_tokenizer().decode(alpaca_llm.alpaca_tokenizer()(PROMPT).input_ids[1:]) == PROMPT


def old_tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "llm")


def test_known_words_keep_their_embedding_and_new_ones_begin_as_the_mean_of_their_parts():
    old, new = old_tokenizer(), alpaca_llm.alpaca_tokenizer()
    model = LlamaForCausalLM.from_pretrained(TINY / "llm")
    grown = alpaca_llm.with_vocabulary(model, old, new)
    table, new_table = (m.get_input_embeddings().weight for m in (model, grown))
    assert len(new_table) == len(new)
    assert torch.equal(new_table[new.convert_tokens_to_ids("▁red")], table[old.convert_tokens_to_ids("▁red")])
    word = "▁describes"
    assert word in new.get_vocab()
    assert word not in old.get_vocab()
    parts = old.convert_tokens_to_ids(old.tokenize("describes"))
    # float32 rounding.
    assert torch.allclose(new_table[new.convert_tokens_to_ids(word)], table[parts].mean(0), atol=1e-6)
    layer, grown_layer = (m.model.layers[1].mlp.up_proj.weight for m in (model, grown))
    assert torch.equal(layer, grown_layer)


def test_a_document_counts_its_answers_in_full():
    rng = np.random.default_rng(0)
    documents = [alpaca_llm.alpaca_document(rng) for _ in range(50)]
    in_template = [(text, spans) for text, spans in documents if "### Response:" in text]
    assert 30 < len(in_template) < 50
    for text, ((start, end),) in in_template:
        assert text[:start].endswith("### Response:")
        assert text[start:end].endswith("</s>")


def test_the_committed_model_answers_from_notes_and_has_this_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "alpaca_llm")
    assert tokenizer(PROMPT).input_ids == alpaca_llm.alpaca_tokenizer()(PROMPT).input_ids
    model = LlamaForCausalLM.from_pretrained(TINY / "alpaca_llm").eval()
    # Measured 100% of 200.
    assert alpaca_llm.alpaca_accuracy(model, tokenizer, seed=1, num=40) > 0.9
