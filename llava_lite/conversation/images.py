"""Put image placeholders into turns, and group the images that a caller gives by prompt."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import Rendered, put_images_first
from llava_lite.media.image import shorten, upright_image


def add_placeholders(question: str, history, num_images: int) -> str:
    """Return a question with a line `<image>` in front for each image of the conversation that has no placeholder.

    history: earlier (question, answer) pairs or None. Raises ValueError if there are more placeholders than images, or
    if the question has some of those it needs.
    """
    here = question.count(DEFAULT_IMAGE_TOKEN)
    earlier = sum(turn.count(DEFAULT_IMAGE_TOKEN) for turns in history or [] for turn in turns)
    missing = num_images - earlier - here
    if missing < 0 or (missing > 0 and here > 0):
        raise ValueError(
            f"{earlier + here} {DEFAULT_IMAGE_TOKEN} placeholders in the conversation but {num_images} images. Give "
            "an image for every placeholder, or leave the placeholders out of the question to have them added."
        )
    return put_images_first(question, missing)


def place_images(turns, template, use_start_end=False) -> tuple[tuple[str, str | None], ...]:
    """Return the (speaker, text) turns of a record with images, each `<image>` where the model is to read it.

    The placeholder of a turn with one image moves to the front, on a line of its own, as in LLaVA; several stay in
    their places, as in MoE-LLaVA. template: a Conversation; one with mmtag wraps each in `<Image></Image>`, and
    `use_start_end` wraps each in `<im_start><im_end>`. Not for records without images: there `<image>` is plain text.
    """
    placeholder, placed = get_placeholder(template, use_start_end), []
    for speaker, text in turns:
        if text is not None and text.count(DEFAULT_IMAGE_TOKEN) == 1:
            text = put_images_first(text.replace(DEFAULT_IMAGE_TOKEN, "").strip(), 1).strip()
        placed.append((speaker, text and text.replace(DEFAULT_IMAGE_TOKEN, placeholder)))
    return tuple(placed)


def get_placeholder(template, use_start_end: bool) -> str:
    """Return what stands for an image in the prompts of a template."""
    placeholder = DEFAULT_IMAGE_TOKEN
    if use_start_end:
        placeholder = DEFAULT_IM_START_TOKEN + placeholder + DEFAULT_IM_END_TOKEN
    return f"<Image>{placeholder}</Image>" if "mmtag" in template.version else placeholder


def drop_placeholders(turns) -> tuple[tuple[str, str | None], ...]:
    """Return the (speaker, text) turns of a record with images without their `<image>`, for a model that needs none.

    The text of a turn that had one loses the spaces and lines around it, as in LLaMA2-Accessory.
    """
    return tuple(
        (speaker, text.replace(DEFAULT_IMAGE_TOKEN, "").strip() if text and DEFAULT_IMAGE_TOKEN in text else text)
        for speaker, text in turns
    )


def with_placeholders(rendered: Rendered, num_images: int) -> Rendered:
    """Return a prompt with a line `<image>` in front for each of its images, its spans moved along."""
    return _moved(rendered, put_images_first(rendered.text, num_images), len(put_images_first("", num_images)))


def without_placeholder(rendered: Rendered) -> Rendered:
    """Return a prompt without its `<image>`, and the line that it stood on, for a model that puts images elsewhere.

    Raises ValueError if there are several.
    """
    before, placeholder, after = rendered.text.partition(DEFAULT_IMAGE_TOKEN)
    if DEFAULT_IMAGE_TOKEN in after:
        raise ValueError(
            f"{rendered.text.count(DEFAULT_IMAGE_TOKEN)} images in {shorten(rendered.text)!r}; this model takes one "
            "image a prompt."
        )
    rest = after.removeprefix("\n") if placeholder else after
    return _moved(rendered, before + rest, len(before) + len(rest) - len(rendered.text), len(before))


def _moved(rendered: Rendered, text: str, by: int, start: int = 0) -> Rendered:
    """Return a prompt with another text, in which the spans after a position lie further on."""
    spans = (
        [(a + by * (a >= start), b + by * (b > start)) for a, b in part]
        for part in (rendered.answers, rendered.literals)
    )
    answers, literals = map(tuple, spans)
    return rendered._replace(text=text, answers=answers, literals=literals)


def group_images(images, texts) -> list[list[Image.Image]]:
    """Return one list of upright RGB images for each text, as many as it has placeholders.

    images: None, an image, all images in the order of the placeholders, or one list (or None) for each text; an array
    of four dimensions is a list of images. Raises ValueError if placeholders and images do not match.
    """
    return open_groups(_split(images, [text.count(DEFAULT_IMAGE_TOKEN) for text in texts]), texts)


def open_groups(groups: list[list], texts: list[str]) -> list[list[Image.Image]]:
    """Return the images of each text as upright RGB images; ValueError if a text has more or fewer placeholders."""
    for text, group in zip(texts, groups, strict=True):
        count = text.count(DEFAULT_IMAGE_TOKEN)
        if count != len(group):
            advice = "Remove a placeholder or add an image."
            if count < len(group):
                advice = "Add a placeholder or remove an image."
            raise ValueError(
                f"{count} {DEFAULT_IMAGE_TOKEN} placeholders but {len(group)} images in {shorten(text)!r}. {advice}"
            )
    return [[upright_image(image) for image in group] for group in groups]


def as_list(images) -> list:
    """Return the images of one text as a list: [] for None, a list of one for a single image."""
    if images is None:
        return []
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    is_many = isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))
    is_iterator = isinstance(images, Iterator) and not hasattr(images, "read")
    return list(images) if is_many or is_iterator else [images]


def _split(images, counts: list[int]) -> list[list]:
    """Return the images of each text: in the caller's lists, else by the number of placeholders."""
    if images is None:
        return [[] for _ in counts]
    images = as_list(images)
    if any(group is None or _is_group(group) for group in images):
        if len(images) != len(counts):
            raise ValueError(f"{len(images)} lists of images for {len(counts)} texts; give one list for each text.")
        return [as_list(group) for group in images]
    if len(images) != sum(counts):
        raise ValueError(
            f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} placeholders in {len(counts)} texts but {len(images)} images. "
            "Each placeholder needs an image and each image a placeholder."
        )
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in counts]


def _is_group(value) -> bool:
    is_stack = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4
    return is_stack or isinstance(value, (list, tuple))
