"""Turn the language model of playground/tiny into one whose tokenizer has the words of easy-VQA; nothing is trained.

python -m playground.easy_vqa.llm --data easy_vqa/data --out easy_vqa/llm

Spelled in letters, as the tiny tokenizer would read them, a question is two to three times as long, and "gray" is hard
to compare with what the image shows. A new word begins as the mean of its old parts.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

from llava_lite.conversation import get_template
from playground.tiny.alpaca_llm import with_vocabulary
from playground.tiny.text import make_tokenizer

TINY_LLM = Path(__file__).parents[1] / "tiny/llm"


def get_texts(data):
    """Return the sentences of the records below `data`, each once, and the template with the first question."""
    turns = [
        turn["value"].replace("<image>", "").strip()
        for name in ("captions", "conversations")
        for record in json.loads((data / f"{name}.json").read_text())
        for turn in record["conversations"]
    ]
    longest = max(turns, key=len)
    frame = get_template("v1").with_turns([("human", longest), ("gpt", "answer")]).render().text
    return [*sorted({*turns} - {""}), frame]


def make_llm(data):
    """Return the language model and its tokenizer for the records below `data`."""
    tokenizer = make_tokenizer(get_texts(data))
    model = LlamaForCausalLM.from_pretrained(TINY_LLM)
    return with_vocabulary(model, AutoTokenizer.from_pretrained(TINY_LLM), tokenizer), tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory that make_data has written")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    for part in make_llm(args.data):
        part.save_pretrained(args.out)


if __name__ == "__main__":
    main()
