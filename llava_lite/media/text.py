"""Turn a text into the token ids that ImageBind's text branch reads."""

from __future__ import annotations

from functools import lru_cache

import torch

from llava_lite.hub.errors import find_file
from llava_lite.hub.json_files import check_json_of_tokenizer

# A small repository with CLIP's vocabulary, which all of CLIP's and ImageBind's text towers share.
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"


def load_text(text, tokenizer=CLIP_TOKENIZER, text_len=77) -> torch.Tensor:
    """Return the ids [text_len] of a text, a begin and an end token around it, zeros after it.

    text: str or bytes. tokenizer: CLIP's, or the directory or hub id of it. A text that is too long keeps its end
    token as the last: the encoder reads the feature there. The original cuts it off and reads it at whatever id is the
    largest (facebookresearch/ImageBind, issue 82).
    """
    if isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer)
    if isinstance(text, (bytes, bytearray)):
        text = bytes(text).decode("utf-8")
    if not isinstance(text, str):
        raise TypeError(f"a text is a str; got {type(text).__name__}.")
    words = tokenizer(text, add_special_tokens=False)["input_ids"][: text_len - 2]
    ids = torch.zeros(text_len, dtype=torch.long)
    ids[: len(words) + 2] = torch.tensor([tokenizer.bos_token_id, *words, tokenizer.eos_token_id])
    return ids


@lru_cache(maxsize=4)
def open_tokenizer(name: str):
    """Return CLIP's tokenizer from a directory or hub id."""
    from transformers import CLIPTokenizer

    check_json_of_tokenizer(lambda file: find_file(name, file, {}))
    return CLIPTokenizer.from_pretrained(name)
