"""Turn a rendered conversation into token ids and labels."""

from itertools import pairwise

from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX


def tokenize_rendered(rendered, tokenizer, has_image) -> tuple[list[int], list[int]]:
    """Return the ids and labels [T] of a rendered conversation; with an open last turn the ids are the prompt.

    A token is supervised if one of its characters lies in an answer; no second tokenisation has to agree with the
    first. With `rendered.cuts_prompts` no token reaches into an answer: a prompt gives the tokens that it gives alone.
    has_image: each `<image>` becomes one IMAGE_TOKEN_INDEX, never supervised; False: it is text like any other.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token comes from, which the labels need. "
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
        # An answer may begin with the letters of BOS; a prompt that does so was written by a template.
        is_answer = labels[:1] != [IGNORE_INDEX]
        bos = bos_of(tokenizer) if is_answer else _missing_bos(ids, tokenizer)
        ids, labels = bos + ids, [IGNORE_INDEX] * len(bos) + labels
    return ids, labels


def bos_of(tokenizer) -> list[int]:
    """Return BOS if the tokenizer begins with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _missing_bos(ids, tokenizer) -> list[int]:
    """Return the BOS that is still to be put in front; a chat template may have written it as text."""
    bos = bos_of(tokenizer)
    return [] if ids[:1] == bos else bos


def _chunks(text, has_image):
    """Yield (where it starts, text), and (where, None) for an image, in order."""
    start = 0
    while has_image and (at := text.find(DEFAULT_IMAGE_TOKEN, start)) >= 0:
        yield start, text[start:at]
        yield at, None
        start = at + len(DEFAULT_IMAGE_TOKEN)
    yield start, text[start:]


def _cuts(rendered, tokenizer, has_image) -> set[int]:
    """Return where the text is cut so that what spells a token stays text: after the first letter of each."""
    cuts = {start + 1 for start, _ in rendered.literals}
    if not has_image and DEFAULT_IMAGE_TOKEN in rendered.text and DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab():
        at = rendered.text.find(DEFAULT_IMAGE_TOKEN)
        while at >= 0:
            cuts.add(at + 1)
            at = rendered.text.find(DEFAULT_IMAGE_TOKEN, at + 1)
    return cuts


def _tokens(chunk, start, tokenizer, cuts) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a chunk and the characters of each in the whole text; no token reaches over a cut."""
    inside = sorted(cut - start for cut in cuts if start < cut < start + len(chunk))
    ids, spans = [], []
    for begin, end in pairwise([0, *inside, len(chunk)]):
        own, places = _encode(chunk[begin:end], tokenizer, continues=begin > 0)
        ids += own
        spans += [(start + begin + first, start + begin + last) for first, last in places]
    return ids, spans


def _encode(text, tokenizer, continues=False) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text and the characters of each; continues: it follows other text.

    At the beginning of a text SentencePiece puts a blank, which is none of the text; after a line break it puts none.
    """
    if continues:
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids, spans = _encode(f"\n{text}", tokenizer)
        if ids[: len(line)] == line:
            return ids[len(line) :], [(max(first - 1, 0), last - 1) for first, last in spans[len(line) :]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _crossed(spans, answers) -> set[int]:
    """Return the beginnings of answers that lie within a token."""
    starts, crossed = iter(sorted(start for start, _ in answers)), set()
    start = next(starts, None)
    for first, last in spans:
        while start is not None and start <= first:
            start = next(starts, None)
        if start is None:
            break
        if start < last:
            crossed.add(start)
    return crossed


def _labels(ids, spans, answers) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    # Both spans and answers go from left to right, so one walk is enough.
    answers = iter(answers)
    answer = next(answers, None)
    for i, (start, end) in enumerate(spans):
        # A blank that the tokenizer puts in itself has no width; it belongs to the character that it stands before.
        end = max(end, start + 1)
        while answer is not None and answer[1] <= start:
            answer = next(answers, None)
        if answer is None:
            break
        if end > answer[0]:
            labels[i] = ids[i]
    return labels


def _expect_text(ids, spans, rendered, tokenizer) -> None:
    """Raise ValueError if a special token that is to be text is a token all the same: one of a single letter."""
    if not rendered.literals:
        return
    tokens = tokenizer.added_tokens_decoder
    for start, end in rendered.literals:
        word = rendered.text[start:end]
        inside = [token for token, (first, last) in zip(ids, spans, strict=True) if first < end and last > start]
        if any(token in tokens and tokens[token].special and tokens[token].content in word for token in inside):
            raise ValueError(
                f"the special token {word!r} in a text cannot be encoded as text by this tokenizer; take it out of "
                "the text, or let it be the token: --special_tokens_in_text token."
            )
