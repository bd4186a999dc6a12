"""Ask a model many questions: in batches of prompts of equal length, each answer handed on as soon as it is there."""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from llava_lite.conversation.images import add_placeholders
from llava_lite.eval.questions import Question
from llava_lite.inference import prepare, reply
from llava_lite.media.image import open_image

# More than the prompt format of any template writes around a question.
TEMPLATE_BYTES = 2048


@dataclass(frozen=True)
class Generation:
    """How answers are generated; the defaults are those of LLaVA's evaluation scripts: greedy, 128 tokens.

    seed: of the first question, where answers are sampled. image_aspect_ratio: None for the checkpoint's own; a model
    with anyres keeps it. more: further keywords of `generate`.
    """

    conv_template: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    num_beams: int = 1
    seed: int = 0
    image_aspect_ratio: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return the keywords of `reply`."""
        known = ("conv_template", "max_new_tokens", "temperature", "num_beams")
        return {name: getattr(self, name) for name in known} | self.more


def in_batches(questions: Sequence[Question], positions: Iterable[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of positions whose questions have equally many images and texts of similar length, longest first.

    The longest come first so that memory that does not suffice shows at once.
    """
    groups: dict[int, list[int]] = {}
    for position in positions:
        groups.setdefault(len(questions[position].images), []).append(position)
    for _, group in sorted(groups.items(), reverse=True):
        group.sort(key=lambda position: -len(questions[position].text))
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def ask(
    model,
    processor,
    questions: Sequence[Question],
    positions: Sequence[int],
    generation: Generation,
    batch_size: int = 1,
    on_answers: Callable[[dict[int, str]], None] = lambda answers: None,
    answered: Container[int] = (),
) -> None:
    """Ask the questions at `positions`, and call on_answers with {position: answer} after each batch.

    answered: positions that have an answer already. Where answers are sampled those depend on all of their batch: it
    stays as it was, and is asked again if one is missing. Raises ValueError with the question's id for an image that
    cannot be read, a prompt that is longer than the model's context, and what `reply` refuses.
    """
    samples = generation.temperature > 0
    if not samples:
        positions = [position for position in positions if position not in answered]
    for batch in in_batches(questions, positions, batch_size):
        if all(position in answered for position in batch):
            continue
        if samples:
            # A seed of its own, so that a run that goes on after a kill samples as one that was not killed.
            torch.manual_seed(generation.seed + batch[0])
        chosen = [questions[position] for position in batch]
        images = [read_images(question) for question in chosen]
        for question, shown in zip(chosen, images, strict=True):
            check_fits(model, processor, question, shown, generation.conv_template)
        texts = reply(model, processor, [question.text for question in chosen], images, **generation.arguments())
        found = dict(zip(batch, texts, strict=True))
        on_answers({position: text for position, text in found.items() if position not in answered})


def check_question(question: Question) -> None:
    """Raise ValueError with the question's id for a text that cannot be asked about its images."""
    try:
        question.text.encode()
        add_placeholders(question.text, None, len(question.images))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"question {question.id!r}: character {error.start} of its text is half of a pair, "
            f"{question.text[error.start]!r}, which no tokenizer reads. Write the character as one."
        ) from error
    except ValueError as error:
        raise ValueError(f"question {question.id!r}: {error}") from error


def check_fits(model, processor, question: Question, images: Sequence[Image.Image], conv_template=None) -> None:
    """Raise ValueError with the question's id for a prompt of more tokens than the model has positions."""
    limit = max_positions(model.config)
    # Few tokens are shorter than a byte: most questions need no count.
    most = len(question.text.encode()) + TEMPLATE_BYTES
    most += sum(processor.image_layout.num_tokens(image.size) for image in images)
    if limit is None or most <= limit:
        return
    inputs, _ = prepare(processor, [question.text], [images], conv_template)
    if (found := inputs["input_ids"].shape[1]) > limit:
        raise ValueError(
            f"question {question.id!r} has {found:,} tokens with its images, and the model's context is {limit:,}. "
            "Shorten the question, or leave it out."
        )


def max_positions(config) -> int | None:
    """Return the tokens of a model's context, as far as its positions are scaled; None where it has no limit."""
    text = config.get_text_config()
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if limit is not None and rope.get("factor") and "original_max_position_embeddings" not in rope:
        limit = int(limit * rope["factor"])
    return limit


def read_images(question: Question) -> list[Image.Image]:
    """Return the images of a question as they are stored: LLaVA's programs do not turn them by their EXIF.

    Raises ValueError with the question's id for one that cannot be read.
    """
    try:
        images = [image() if callable(image) else image for image in question.images]
        images = [open_image(io.BytesIO(image) if isinstance(image, bytes) else image) for image in images]
    except (OSError, ValueError) as error:
        raise ValueError(f"question {question.id!r}: {error}") from error
    # An image of pixels alone: `reply` turns one upright that still knows its EXIF.
    return [Image.frombytes(image.mode, image.size, image.tobytes()) for image in images]
