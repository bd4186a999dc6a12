"""Turn prompts into token ids; the picture functions of pictures.py under LLaVA's names."""

from itertools import accumulate

import torch
from transformers import StoppingCriteria

from llava_lite.anyres import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
)
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
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
from llava_lite.token_labels import bos_of, tokenize_rendered

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
    ids = bos_of(tokenizer) + ids
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


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
