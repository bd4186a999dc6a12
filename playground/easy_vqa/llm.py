"""Turn the language model of playground/tiny into one whose tokenizer has the words of easy-VQA; nothing is trained.

python -m playground.easy_vqa.llm --data easy_vqa/data --out easy_vqa/llm

Spelled in letters, as the tiny tokenizer would read them, a question is two to three times as long, and "gray" is hard
to compare with what the image shows. A new word begins at random: as means of their letters, which they share,
"triangle" and "rectangle" began so alike that the model learned to compare neither with an image.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llava_lite.conversation import get_template
from playground.tiny.alpaca_llm import with_vocabulary
from playground.tiny.text import make_tokenizer

TINY_LLM = Path(__file__).parents[1] / "tiny/llm"


def get_texts(data):
    """Return questions and answers of the records below `data`, each once, and the template with the first question.

    Captions and questions without a template are of the same words.
    """
    turns = [
        turn["value"].replace("<image>", "").strip()
        for record in json.loads((data / "conversations.json").read_text())
        for turn in record["conversations"]
    ]
    longest = max(turns, key=len)
    frame = get_template("v1").with_turns([("human", longest), ("gpt", "answer")]).render().text
    return [*sorted({*turns} - {""}), frame]


def make_llm(data, seed=0):
    """Return the language model and its tokenizer for the records below `data`."""
    old, tokenizer = AutoTokenizer.from_pretrained(TINY_LLM), make_tokenizer(get_texts(data))
    model = with_vocabulary(LlamaForCausalLM.from_pretrained(TINY_LLM), old, tokenizer)
    draw_words(model, sorted(set(tokenizer.get_vocab().values()) - kept_ids(old, tokenizer)), seed)
    return model, tokenizer


def kept_ids(old, tokenizer):
    """Return the ids of the words that an old tokenizer has too."""
    known = old.get_vocab()
    return {index for word, index in tokenizer.get_vocab().items() if word in known}


@torch.no_grad()
def draw_words(model, ids, seed):
    """Fill the embeddings of some words with random numbers, as spread as those of the others."""
    table = model.get_input_embeddings().weight  # [V, D]
    others = torch.ones(len(table), dtype=torch.bool)
    others[ids] = False
    generator = torch.Generator().manual_seed(seed)
    table[ids] = table[others].std() * torch.randn(len(ids), table.shape[1], generator=generator)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory that make_data has written")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    for part in make_llm(args.data):
        part.save_pretrained(args.out)


if __name__ == "__main__":
    main()
