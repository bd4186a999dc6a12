"""Turn a rendered conversation into token ids and labels; the picture functions of pictures.py under LLaVA's names."""

from itertools import accumulate

import torch
from transformers import StoppingCriteria

from llava_lite.anyres import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
)
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.pictures import (
    PictureError,
    expand2square,
    load_image_from_base64,
    load_image_processor,
    open_picture,
    prepare_picture,
    process_anyres_image,
    process_images,
    to_rgb,
)

__all__ = [
    "KeywordsStoppingCriteria",
    "PictureError",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "load_image_processor",
    "open_picture",
    "prepare_picture",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "to_rgb",
    "tokenize_rendered",
    "tokenizer_image_token",
    "truncate_example",
]


def tokenizer_image_token(prompt, tokenizer, image_token_index=IMAGE_TOKEN_INDEX, return_tensors=None):
    """Return the ids of a prompt with one `image_token_index` for each `<image>`, behind BOS if the tokenizer has one.

    A BOS that the prompt itself begins with stays, as in LLaVA. A list, or a LongTensor [T] with return_tensors="pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"unsupported return_tensors {return_tensors!r}; known: None, 'pt'.")
    ids = []
    for i, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if i:
            ids.append(image_token_index)
        ids.extend(tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"])
    ids = _bos(tokenizer) + ids
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def tokenize_rendered(rendered, tokenizer, has_image) -> tuple[list[int], list[int]]:
    """Return the ids and labels [T] of a rendered conversation; with an open last turn the ids are the prompt.

    A token is learned if one of its characters lies in an answer; no second tokenisation has to agree with the first.
    has_image: each `<image>` becomes one IMAGE_TOKEN_INDEX, which is never learned; False: it is text like any other.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token comes from, which the labels need. "
            "Load it with AutoTokenizer and use_fast=True, or convert it to a tokenizer.json first."
        )
    ids, labels = [], []
    for start, chunk in _chunks(rendered.text, tokenizer, has_image):
        if chunk is None:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            continue
        encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [(start + begin, start + end) for begin, end in encoded["offset_mapping"]]
        ids.extend(encoded["input_ids"])
        labels.extend(_labels(encoded["input_ids"], spans, rendered.answers))
    if rendered.add_special_tokens:
        # An answer may begin with the letters of BOS; a prompt that does so was written by a template.
        is_answer = labels[:1] != [IGNORE_INDEX]
        bos = _bos(tokenizer) if is_answer else _missing_bos(ids, tokenizer)
        ids, labels = bos + ids, [IGNORE_INDEX] * len(bos) + labels
    return ids, labels


def _bos(tokenizer) -> list[int]:
    """Return BOS if the tokenizer begins with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _missing_bos(ids, tokenizer) -> list[int]:
    """Return the BOS that is still to be put in front; a chat template may have written it as text."""
    bos = _bos(tokenizer)
    return [] if ids[:1] == bos else bos


def _chunks(text, tokenizer, has_image):
    """Yield (where it starts, text), and (where, None) for a picture, in order."""
    # A tokenizer may know "<image>" as a token; without a picture the word is cut in two, so that it stays text.
    is_word = not has_image and DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab()
    start = 0
    while has_image or is_word:
        at = text.find(DEFAULT_IMAGE_TOKEN, start)
        if at < 0:
            break
        cut = at + 1 if is_word else at
        yield start, text[start:cut]
        if has_image:
            yield at, None
        start = cut if is_word else at + len(DEFAULT_IMAGE_TOKEN)
    yield start, text[start:]


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


def truncate_example(input_ids, labels, max_length, num_image_tokens=None, image_token_index=IMAGE_TOKEN_INDEX):
    """Cut ids and labels [L] behind max_length; return them with the number of whole pictures that were cut off.

    input_ids: one placeholder for each feature. num_image_tokens: features of a picture, or a list of those of each;
    without it, placeholders in a row count as one picture. Raises ValueError where the cut would go through a picture.
    """
    if len(input_ids) <= max_length:
        return input_ids, labels, 0
    pictures = _picture_spans(input_ids, num_image_tokens, image_token_index)
    for start, end in pictures:
        if start < max_length < end:
            raise ValueError(
                f"{len(input_ids)} tokens are more than the maximum of {max_length}, and the cut would leave "
                f"{max_length - start} of the {end - start} features of a picture. Raise --model_max_length, or give "
                "the record fewer pictures or less text before them."
            )
    num_cut = sum(start >= max_length for start, _ in pictures)
    return input_ids[:max_length], labels[:max_length], num_cut


def _picture_spans(input_ids, num_image_tokens, image_token_index) -> list[tuple[int, int]]:
    """Return the [start, end) of each picture."""
    places = [i for i, token in enumerate(input_ids) if int(token) == image_token_index]
    if isinstance(num_image_tokens, int):
        return [(start, start + num_image_tokens) for start in places[::num_image_tokens]]
    if num_image_tokens is not None:
        lengths = list(num_image_tokens)
        return [(places[end - n], places[end - 1] + 1) for end, n in zip(accumulate(lengths), lengths, strict=True)]
    starts = [i for i, before in zip(places, [-2, *places], strict=False) if i != before + 1]
    ends = [i + 1 for i, after in zip(places, [*places[1:], -1], strict=True) if after != i + 1]
    return list(zip(starts, ends, strict=True))


def get_model_name_from_path(model_path) -> str:
    """Return the last part of a path, with its parent for a `checkpoint-N`. Nothing is decided by this name."""
    parts = str(model_path).strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a row once what it says ends with a keyword's tokens, or holds a keyword in its newest tokens.

    input_ids: the prompt [B, T]; generate may hand over the prompt with the answer or the answer alone.
    """

    def __init__(self, keywords, tokenizer, input_ids):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        # A keyword is spread over at most as many tokens as it has bytes.
        self.num_newest = max((len(keyword.encode()) for keyword in self.keywords), default=0)

    def __call__(self, output_ids, scores=None, **kwargs) -> torch.BoolTensor:
        """Return which rows are done, [B]."""
        start = self._prompt_len(output_ids)
        answers = output_ids[:, start:][:, -self.num_newest :] if self.num_newest else output_ids[:, :0]
        done = [any(keyword in self._text(row) for keyword in self.keywords) for row in answers]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def call_for_batch(self, output_ids, scores=None, **kwargs) -> bool:
        """Return whether the only row [1, T] is done (LLaVA's name, which asks row by row)."""
        return bool(self(output_ids, scores, **kwargs).all())

    def _prompt_len(self, output_ids) -> int:
        prompt = self.prompt.to(output_ids.device)
        length = prompt.shape[-1]
        if output_ids.shape[-1] < length:
            return 0
        # A placeholder is below zero in the prompt and something else in what generate sees.
        same = (output_ids[:, :length] == prompt) | (prompt < 0)
        return length if bool(same.all()) else 0

    def _text(self, row) -> str:
        return self.tokenizer.decode(row[row >= 0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
