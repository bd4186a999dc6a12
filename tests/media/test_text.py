"""Ids of a text have a begin and an end token, whatever its length."""

import json

import pytest
import torch
from transformers import CLIPTokenizer

from llava_lite.media.text import load_text


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer of CLIP's kind for single letters; as in CLIP's, the end token has the largest id."""
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    vocab = {word: index for index, word in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(path)
    return str(path)


def test_a_text_lies_between_its_two_tokens(tokenizer_dir):
    ids = load_text("ab c", tokenizer_dir)
    assert ids.dtype == torch.long
    # a, b</w>, c</w>: letters from 0, letters at the end of a word from 26.
    assert ids.tolist() == [52, 0, 27, 28, 53] + [0] * 72
    assert torch.equal(load_text(b"AB  c", tokenizer_dir), ids)
    assert torch.equal(load_text("ab c", CLIPTokenizer.from_pretrained(tokenizer_dir)), ids)


def test_a_long_text_keeps_its_end_token(tokenizer_dir):
    ids = load_text("z " * 200, tokenizer_dir)
    assert ids.tolist() == [52] + [51] * 75 + [53]
    assert int(ids.argmax()) == 76
    assert load_text("z " * 200, tokenizer_dir, text_len=12).tolist() == [52] + [51] * 10 + [53]


def test_an_empty_text_is_both_tokens(tokenizer_dir):
    assert load_text("", tokenizer_dir, text_len=4).tolist() == [52, 53, 0, 0]


def test_what_is_no_text_is_refused(tokenizer_dir):
    with pytest.raises(TypeError, match="a text is a str; got int"):
        load_text(3, tokenizer_dir)
