"""The least number of tokens of a text is never more than it has, in every kind of tokenizer."""

import json
import random

import pytest
from conftest import WORDS
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_lite.serve.api import text_bound
from llava_lite.serve.api.text_bound import TextBound

LONG = {
    "words": " ".join(WORDS * 500),
    "letters": "a" * 50_000,
    "chinese": "\u6c49\u5b57" * 1000,
    "emoji": "\U0001f600" * 1000,
    "spaces": " " * 3000 + "\n\t" * 500 + "\u3000" * 500,
    "word starts": "\u2581" * 2000,
    "combining": "e\u0301\u0323" * 1000,
    "ligatures": "\ufb03" * 1000,
    "special": "</s><|im_end|>" * 300,
    "control": "\x00\x01" * 500,
}


def num_tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def random_texts():
    rng = random.Random(0)
    alphabet = "ab \n\u2581\u00e9e\u0301\u6c49\U0001f600</s><|im_end|>"
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(300)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("normalizer", [None, "NFKC", "drops", "strips"])
@pytest.mark.parametrize("swallows", [False, True])
def test_a_text_has_no_fewer_tokens_than_the_bound(toy_tokenizer_for, kind, normalizer, swallows):
    tokenizer = toy_tokenizer_for(kind)
    backend = tokenizer.backend_tokenizer
    if normalizer is not None:
        kinds = {"NFKC": normalizers.NFKC(), "drops": normalizers.Replace("a", ""), "strips": normalizers.Strip()}
        added = kinds[normalizer]
        backend.normalizer = normalizers.Sequence([added, *([backend.normalizer] if backend.normalizer else [])])
    tokenizer.add_tokens([AddedToken("<|im_end|>", lstrip=swallows, rstrip=swallows, special=True)])
    bound = TextBound(tokenizer)
    for text in [*LONG.values(), *random_texts()]:
        assert bound.least_tokens(text, 10**9) <= num_tokens(tokenizer, text), text[:50]
    # It is no bound if it is 0 for all.
    assert bound.least_tokens(LONG["words"], 10**9) > len(LONG["words"]) / 30
    assert bound.least_tokens(LONG["chinese"], 10**9) > 100
    if not swallows and normalizer != "strips":
        assert bound.least_tokens(LONG["spaces"], 10**9) > 200


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_long_text_is_normalised_no_further_than_needed(toy_tokenizer_for, monkeypatch, kind):
    tokenizer = toy_tokenizer_for(kind)
    bound, read = TextBound(tokenizer), []
    normalize = bound._normalize
    monkeypatch.setattr(bound, "_normalize", lambda text: read.append(len(text)) or normalize(text))
    monkeypatch.setattr(text_bound, "CHUNK", 1000)
    text = "red " * 5000
    assert 200 < bound.least_tokens(text, 200) < 400
    assert sum(read) < 10_000
    assert bound.least_tokens(text, 10**9) <= num_tokens(tokenizer, text)
    assert read[-1] == 1000


@pytest.mark.parametrize("kind", ["no bytes", "removed", "unigram"])
def test_of_a_tokenizer_that_joins_or_drops_characters_nothing_is_known(toy_tokenizer, kind):
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    elif kind == "no bytes":
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.train_from_iterator(["a b c"], trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    else:
        backend = toy_tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Split("z", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert num_tokens(tokenizer, "z" * 5000) <= 1
    assert TextBound(tokenizer).least_tokens("z" * 5000, 10**9) == 0
    assert json.loads(backend.to_str())["model"]["vocab"]
