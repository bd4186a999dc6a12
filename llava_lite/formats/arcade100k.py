"""Turn the tokenizer file of StableLM 2 as MoE-LLaVA carries it, arcade100k.tiktoken, into a fast tokenizer.

The file lists byte strings by rank; the rest (special tokens, how text is split) stands in the Python code beside it,
which transformers would have to run. Here that rest is data.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FILE = "arcade100k.tiktoken"
END = "<|endoftext|>"
FIRST_SPECIAL_ID = 100257
SPECIAL = (
    END,
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    "<gh_stars>",
    "<filename>",
    *(f"<issue_{part}>" for part in ("start", "comment", "closed")),
    *(f"<jupyter_{part}>" for part in ("start", "text", "code", "output")),
    "<empty_output>",
    *(f"<commit_{part}>" for part in ("before", "msg", "after")),
    "<reponame>",
    "<|endofprompt|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pause|>",
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)
# Digits stand alone; otherwise as OpenAI's cl100k.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_arcade100k(file, pad_token: str | None = None, unk_token: str | None = None, **kwargs):
    """Return the tokenizer of an arcade100k.tiktoken; pad_token, unk_token, kwargs: of the tokenizer_config.json."""
    ranks = read_ranks(file)
    letters = bytes_to_unicode()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {words[token]: rank for token, rank in ranks.items()}
    merges = [tuple(words[part] for part in last_merge(token, ranks)) for token in ranks if len(token) > 1]
    vocab |= {token: FIRST_SPECIAL_ID + number for number, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=pad_token or END, unk_token=unk_token, **kwargs
    )


def read_ranks(file) -> dict[bytes, int]:
    """Return the byte strings of a tiktoken file with their ranks, in the order of their ranks."""
    try:
        pairs = [line.split() for line in Path(file).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no list of tokens and ranks ({error}). Copy it again.") from error
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that the token is put together from, when lower ranks are merged first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
