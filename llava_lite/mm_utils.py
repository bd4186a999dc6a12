"""LLaVA's names for images and tokens (llava/mm_utils.py)."""

import torch
from transformers import StoppingCriteria

from llava_lite.conversation.tokenize import tokenizer_image_token
from llava_lite.media.anyres import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
)
from llava_lite.media.image import load_image_from_base64
from llava_lite.media.preprocess import expand2square, process_anyres_image, process_images

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]


def get_model_name_from_path(model_path) -> str:
    """Return the last part of a path, with its parent for a `checkpoint-N`; nothing else uses this name."""
    parts = str(model_path).strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a sequence once its newest tokens hold a keyword as text.

    input_ids: the prompt [B, T]; generate may pass the prompt with the answer, or the answer alone. None for all that
    stands before the first new token; then the object is good for one call of generate.
    """

    def __init__(self, keywords, tokenizer, input_ids=None):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        # A keyword is spread over at most as many tokens as it has bytes.
        self.num_newest = max((len(keyword.encode()) for keyword in self.keywords), default=0)

    def __call__(self, output_ids, scores=None, **kwargs) -> torch.BoolTensor:
        """Return which sequences are done, [B]."""
        start = self._prompt_len(output_ids)
        answers = output_ids[:, start:][:, -self.num_newest :] if self.num_newest else output_ids[:, :0]
        done = [any(keyword in self._text(row) for keyword in self.keywords) for row in answers]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def call_for_batch(self, output_ids, scores=None, **kwargs) -> bool:
        """Return whether the only sequence [1, T] is done (LLaVA calls it for each sequence)."""
        return bool(self(output_ids, scores, **kwargs).all())

    def _prompt_len(self, output_ids) -> int:
        if self.prompt is None:
            self.prompt = output_ids[:, :-1]
        prompt = self.prompt.to(output_ids.device)
        length = prompt.shape[-1]
        if output_ids.shape[-1] < length:
            return 0
        # A placeholder is negative in the prompt and may be another id in what generate passes.
        same = (output_ids[:, :length] == prompt) | (prompt < 0)
        return length if bool(same.all()) else 0

    def _text(self, row) -> str:
        return self.tokenizer.decode(row[row >= 0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
