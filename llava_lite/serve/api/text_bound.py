"""Tell how many tokens a text has at least, without tokenizing it.

A token covers no more characters than the longest entry of the vocabulary has. This holds for tokenizers whose every
character reaches a token of its own or of its neighbours: those of bytes (GPT-2, Qwen, Llama 3) and those that write
unknown characters as bytes (Llama, Mistral). Others join or drop unknown characters: of them nothing is known.
"""

import json

from tokenizers.pre_tokenizers import ByteLevel

# Spaces as SentencePiece writes them, and as bytes are written in a vocabulary.
WORD_START, BYTE_SPACES = "\u2581", "\u0120\u010a\u0109\u010d"
# Characters that are normalised at one time, and by how many characters, or bytes, a cut may change their number.
CHUNK, AT_A_CUT = 2**16, 256
# Parts of tokenizer.json that drop spaces.
DROP_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Strip")


class TextBound:
    """The least number of tokens of a text. tokenizer: a fast one of transformers."""

    def __init__(self, tokenizer):
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        # A pattern may match any length of a text.
        self._reads_far = any("Regex" in step.get("pattern", {}) for step in steps_of(parts["normalizer"]))
        vocabulary = tokenizer.get_vocab()
        self.counts_bytes = has_bytes_of_text(parts, vocabulary)
        is_known = keeps_all_text(parts) and (self.counts_bytes or falls_back_to_bytes(parts, vocabulary))
        added = [text for entry in tokenizer.get_added_vocab() for text in (entry, self._normalize(entry))]

        def longest(change):
            own = [len(change(entry, self.counts_bytes)) for entry in parts["model"]["vocab"]]
            return max([*own, *(self._size(change(entry)) for entry in added)])

        # What is counted -> how many of these characters, or bytes, one token covers.
        self._longest = {without_spaces: longest(without_spaces)} if is_known else {}
        if is_known and keeps_spaces(parts):
            self._longest[as_it_is] = longest(as_it_is)

    def least_tokens(self, text: str, enough: int) -> int:
        """Return a number of tokens that a text has at the least; 0 if nothing is known.

        enough: stop where it has more, since tokenizers normalise slowly and let no other thread run meanwhile.
        """
        if not self._longest:
            return 0
        counts, least = dict.fromkeys(self._longest, 0), 0
        step = len(text) if self._reads_far else CHUNK
        unsure = AT_A_CUT if len(text) > step else 0
        for start in range(0, len(text), step or 1):
            chunk = self._normalize(text[start : start + step])
            for change, longest in self._longest.items():
                counts[change] += max(self._size(change(chunk)) - unsure, 0)
                least = max(least, -(-counts[change] // longest))
            if least > enough:
                break
        return least

    def _size(self, text: str) -> int:
        return len(text.encode("utf-8", "replace")) if self.counts_bytes else len(text)

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)


def as_it_is(text: str, is_of_bytes: bool = False) -> str:
    """Return a text."""
    return text


def without_spaces(text: str, is_of_bytes: bool = False) -> str:
    """Return a text without its spaces, of which one token may cover many. is_of_bytes: of a vocabulary of bytes."""
    text = "".join(text.split()).replace(WORD_START, "")
    return text.translate(dict.fromkeys(map(ord, BYTE_SPACES))) if is_of_bytes else text


def keeps_spaces(parts: dict) -> bool:
    """Return whether spaces reach the model of a tokenizer as other characters do."""
    steps = [*steps_of(parts["pre_tokenizer"]), *steps_of(parts["normalizer"])]
    swallows = any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])
    return not swallows and not any(step["type"] in DROP_SPACES for step in steps)


def steps_of(part: dict | None) -> list[dict]:
    """Return the steps of a part of tokenizer.json, those within a Sequence one by one."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in steps_of(one)]


def keeps_all_text(parts: dict) -> bool:
    """Return whether all characters that are no spaces reach the model of a tokenizer."""
    known = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts", "Whitespace")
    known += ("WhitespaceSplit", "BertPreTokenizer")
    steps = steps_of(parts["pre_tokenizer"])
    is_kept = all(step["type"] in known and step.get("behavior") != "Removed" for step in steps)
    return is_kept and parts["model"]["type"] == "BPE"


def has_bytes_of_text(parts: dict, vocabulary: dict) -> bool:
    """Return whether a text becomes bytes first, each of which is in the vocabulary."""
    is_of_bytes = any(step["type"] == "ByteLevel" for step in steps_of(parts["pre_tokenizer"]))
    return is_of_bytes and all(letter in vocabulary for letter in ByteLevel.alphabet())


def falls_back_to_bytes(parts: dict, vocabulary: dict) -> bool:
    """Return whether characters that are not in the vocabulary become bytes, all of which are."""
    return bool(parts["model"].get("byte_fallback")) and all(f"<0x{i:02X}>" in vocabulary for i in range(256))
