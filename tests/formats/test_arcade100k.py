"""StableLM 2's tokenizer as MoE-LLaVA's directories hold it: ids by byte-pair merging, special tokens, decoding."""

import base64
import json
import unicodedata
from itertools import pairwise

import pytest
import regex
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llava_lite.checkpoints.tokenizer import load_tokenizer
from llava_lite.formats.arcade100k import FILE, read_arcade100k, read_ranks

# The rule of OpenAI's cl100k, with one change: digits stand alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "A chat between a curious user and an assistant.",
    "  two  blanks\n\n and 12345 it's What'S!?",
    "caf\u00e9, cafe\u0301, \u65e5\u672c\u8a9e \U0001f600\ttab",
    "",
)


@pytest.fixture
def directory(toy_tokenizer_for, tmp_path):
    """A directory with the words of a toy vocabulary as tiktoken ranks them: bytes first, then in order of merging."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocab = sorted((index, word) for word, index in toy_tokenizer_for("gpt2").get_vocab().items() if "<|" not in word)
    tokens = [bytes(letters[letter] for letter in word) for _, word in vocab]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    fields = {"tokenizer_class": "Arcade100kTokenizer", "unk_token": "<|reg0|>", "model_max_length": 2048}
    auto_map = {"AutoTokenizer": ["tokenization_arcade100k.Arcade100kTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields | {"auto_map": auto_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moe_llava_stablelm"}))
    return tmp_path


def merged(text, ranks):
    """Return the ids of a text: of all neighbours in a word those of the lowest rank are joined, again and again."""
    ids = []
    for word in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_are_those_of_merging_by_rank(directory):
    tokenizer, ranks = load_tokenizer(directory), read_ranks(directory / FILE)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == merged(text, ranks)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens_have_their_places(directory):
    tokenizer = load_tokenizer(directory)
    places = {"<|endoftext|>": 100257, "<|fim_pad|>": 100261, "<gh_stars>": 100262, "<reponame>": 100275}
    places |= {"<|endofprompt|>": 100276, "<|im_start|>": 100277, "<|reg0|>": 100280, "<|extra0|>": 100288}
    for token, index in places.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer(f"a{token}b")["input_ids"][1] == index
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.unk_token, tokenizer.model_max_length) == ("<|reg0|>", 2048)
    assert tokenizer.decode([100257, *tokenizer("Hi")["input_ids"]], skip_special_tokens=True) == "Hi"


def test_it_is_saved_as_a_tokenizer_that_needs_no_code(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.eos_token == "<|endoftext|>"


def test_a_broken_file_is_named(directory):
    (directory / FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"arcade100k\.tiktoken' is no list of tokens and ranks"):
        read_arcade100k(directory / FILE)
