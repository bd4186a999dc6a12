"""Turn a prompt into token ids, and a rendered conversation into token ids and labels."""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise

import torch

from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX


def tokenizer_image_token(prompt, tokenizer, image_token_index=IMAGE_TOKEN_INDEX, return_tensors=None):
    """Return the ids of a prompt with one `image_token_index` for each `<image>`, after BOS if the tokenizer has one.

    A BOS at the start of the prompt itself stays, as in LLaVA. Returns a list; a LongTensor [T] if
    return_tensors="pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"unsupported return_tensors {return_tensors!r}; known: None, 'pt'.")
    ids = []
    for i, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if i:
            ids.append(image_token_index)
        ids.extend(tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"])
    ids = get_bos(tokenizer) + ids
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def tokenize_rendered(rendered, tokenizer, has_image) -> tuple[list[int], list[int]]:
    """Return the ids and labels [T] of a rendered conversation; with an open last turn the ids are the prompt.

    A token is supervised if one of its characters lies in an answer; the text is tokenised only once. With
    `rendered.cuts_prompts` no token reaches into an answer, so a prompt has the same tokens as it has alone.
    has_image: each `<image>` becomes one IMAGE_TOKEN_INDEX, never supervised; False: it is text like any other.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not return the characters of a token, which the labels need. "
            "Load it with AutoTokenizer and use_fast=True, or convert it to a tokenizer.json first."
        )
    ids, labels = [], []
    cuts = _cuts(rendered, tokenizer, has_image)
    for start, chunk in _chunks(rendered.text, has_image):
        if chunk is None:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            continue
        own, spans = _tokens(chunk, start, tokenizer, cuts)
        crossed = _crossed(spans, rendered.answers) if rendered.cuts_prompts else set()
        if crossed:
            own, spans = _tokens(chunk, start, tokenizer, cuts | crossed)
        ids.extend(own)
        labels.extend(_labels(own, spans, rendered.answers))
        _expect_text(own, spans, rendered, tokenizer)
    if rendered.add_special_tokens:
        bos = get_bos(tokenizer)
        # An answer may begin with the text of BOS; a prompt that begins with it was written by a template.
        if ids[:1] != bos or labels[:1] != [IGNORE_INDEX]:
            ids, labels = bos + ids, [IGNORE_INDEX] * len(bos) + labels
    return ids, labels


def get_bos(tokenizer) -> list[int]:
    """Return [BOS] if the tokenizer begins texts with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _chunks(text, has_image):
    """Yield (start, text) of each text between images, and (start, None) of each image, in order."""
    start = 0
    while has_image and (at := text.find(DEFAULT_IMAGE_TOKEN, start)) >= 0:
        yield start, text[start:at]
        yield at, None
        start = at + len(DEFAULT_IMAGE_TOKEN)
    yield start, text[start:]


def _cuts(rendered, tokenizer, has_image) -> set[int]:
    """Return the positions that no token may cross, so that spelled special tokens stay text: after a first letter."""
    cuts = {start + 1 for start, _ in rendered.literals}
    if not has_image and DEFAULT_IMAGE_TOKEN in rendered.text and DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab():
        cuts |= {match.start() + 1 for match in re.finditer(DEFAULT_IMAGE_TOKEN, rendered.text)}
    return cuts


def _tokens(chunk, start, tokenizer, cuts) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a chunk and the span of each in the full text; no token crosses a cut."""
    inside = sorted(cut - start for cut in cuts if start < cut < start + len(chunk))
    ids, spans = [], []
    for begin, end in pairwise([0, *inside, len(chunk)]):
        own, places = _encode(chunk[begin:end], tokenizer, continues=begin > 0)
        ids += own
        spans += [(start + begin + first, start + begin + last) for first, last in places]
    return ids, spans


def _encode(text, tokenizer, continues=False) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text and the span of each. continues: the text follows other text.

    SentencePiece adds a space at the beginning of a text. After a line break it adds none.
    """
    if continues:
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids, spans = _encode(f"\n{text}", tokenizer)
        if ids[: len(line)] == line:
            return ids[len(line) :], [(max(first - 1, 0), last - 1) for first, last in spans[len(line) :]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _crossed(spans, answers) -> set[int]:
    """Return the starts of answers that lie inside a token."""
    # Spans are sorted: of the tokens that begin before an answer only the last can reach into it.
    firsts = [first for first, _ in spans]
    before = ((start, bisect_left(firsts, start) - 1) for start, _ in answers)
    return {start for start, i in before if i >= 0 and start < spans[i][1]}


def _labels(ids, spans, answers) -> list[int]:
    """Return the ids of tokens that have a character in an answer, IGNORE_INDEX for the others."""
    labels, firsts = [IGNORE_INDEX] * len(ids), [first for first, _ in spans]
    # A space that the tokenizer adds has an empty span; it belongs to the character after it.
    ends = [max(last, first + 1) for first, last in spans]
    for start, end in answers:
        inside = slice(bisect_right(ends, start), bisect_left(firsts, end))
        labels[inside] = ids[inside]
    return labels


def _expect_text(ids, spans, rendered, tokenizer) -> None:
    """Raise ValueError if a special token was not encoded as text, which happens to one of a single letter."""
    if not rendered.literals:
        return
    tokens = tokenizer.added_tokens_decoder
    for start, end in rendered.literals:
        spelled = rendered.text[start:end]
        inside = [token for token, (first, last) in zip(ids, spans, strict=True) if first < end and last > start]
        if any(token in tokens and tokens[token].special and tokens[token].content in spelled for token in inside):
            raise ValueError(
                f"the special token {spelled!r} in a text cannot be encoded as text by this tokenizer; remove it from "
                "the text, or let it become the token: --special_tokens_in_text token."
            )


def truncate_example(input_ids, labels, max_length, lengths):
    """Truncate ids and labels [L] to max_length; return them with the number of images that were cut off.

    input_ids: one placeholder for each feature. lengths: features of each image, in order of appearance. Raises
    ValueError if the cut would divide an image.
    """
    if len(input_ids) <= max_length:
        return input_ids, labels, 0
    places = [i for i, token in enumerate(input_ids) if token == IMAGE_TOKEN_INDEX]
    starts = [places[end - length] for end, length in zip(accumulate(lengths), lengths, strict=True)]
    for start, length in zip(starts, lengths, strict=True):
        if start < max_length < start + length:
            raise ValueError(
                f"{len(input_ids)} tokens are more than the maximum of {max_length}, and the cut would leave "
                f"{max_length - start} of the {length} features of an image. Raise --model_max_length, or give "
                "the record fewer images or less text before them."
            )
    num_cut = sum(start >= max_length for start in starts)
    return input_ids[:max_length], labels[:max_length], num_cut
