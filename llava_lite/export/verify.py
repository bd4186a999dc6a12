"""Turn a model and its processor into answers to fixed questions, and two sets of answers into their differences.

A rewritten checkpoint is opened again and gets the same questions; L tokens of a prompt, V of the vocabulary.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import GenerationConfig

from llava_lite.conversation import EmptyPromptError

NUM_NEW_TOKENS = 12
# No answer ends early, so that all tokens are compared; any id may be the end token.
GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
GREEDY |= {"eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Answer:
    """Inputs and outputs of a model. pixel_values: None without images; tokens: the greedy ones, [NUM_NEW_TOKENS]."""

    input_ids: torch.Tensor  # [L], -1 where an image stands
    pixel_values: torch.Tensor | None
    logits: torch.Tensor  # [L, V]
    tokens: torch.Tensor


@dataclass(frozen=True)
class Difference:
    """How far two sets of answers are apart; logits over the smaller vocabulary."""

    same_ids: bool
    pixels: float
    logits: float
    same_tokens: bool

    def report(self) -> str:
        """Return the differences in a line."""
        tokens = "agree" if self.same_tokens else "differ"
        ids = "equal" if self.same_ids else "DIFFERENT"
        return (
            f"prompt ids {ids}; largest pixel difference {self.pixels:.2g}; "
            f"largest logit difference {self.logits:.2g}; greedy tokens {tokens}"
        )

    def passes(self, tolerance: float) -> bool:
        """Tell whether the answers are equal within `tolerance` of a logit."""
        return self.same_ids and self.same_tokens and self.logits <= tolerance and self.pixels <= tolerance


def conversations(with_images: bool = True, with_many: bool = True) -> list[list[dict]]:
    """Return the questions as messages: about a wide image, in a longer conversation, with two images, with none.

    with_many: False leaves out the longer conversation and the two images, for a model of one question and one image.
    """
    wide, tall = draw(90, 61), draw(47, 80)
    asked = [_message("user", "Who wrote the first book about it?")]
    if not with_images:
        return [asked]
    one = [_message("user", wide, "Describe the picture in detail.")]
    longer = [
        _message("user", tall, "What is this?"),
        _message("assistant", "A pattern of three colours."),
        _message("user", "Which one is the brightest?"),
    ]
    two = [_message("user", wide, tall, "Compare the two images.")]
    return [one, longer, two, asked] if with_many else [one, asked]


def draw(width: int, height: int) -> Image.Image:
    """Return an image of slopes and waves of its own size, always the same."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")  # [H, W]
    colours = torch.stack([255 * x // width, 255 * y // height, (x * y) % 256], dim=-1).to(torch.uint8)
    return Image.fromarray(colours.numpy(), "RGB")


def _message(role: str, *parts: str | Image.Image) -> dict:
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]}


def read(processor, messages) -> dict:
    """Return the inputs that a processor makes of messages, {} where its format has no room for them."""
    try:
        return dict(
            processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
            )
        )
    except EmptyPromptError:
        return {}


def readings(processor, with_images: bool = True) -> list[dict]:
    """Return the inputs of every conversation."""
    with_many = not getattr(processor, "ignores_placeholders", False)
    return [read(processor, messages) for messages in conversations(with_images, with_many)]


def placed(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """Return the ids [L] with -1 where an image stands, whatever its placeholder is."""
    return input_ids[0].masked_fill(input_ids[0] == image_token, -1)


@torch.no_grad()
def answers(model, batches: list[dict], image_token: int) -> list[Answer | None]:
    """Return what a model, in eval mode, answers to the inputs of `readings`; None where its format has no room."""
    # PEFT's model shares its generation config with the model inside.
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    # Its own way of generating (several answers, a penalty) is not what is compared, and may refuse a greedy one.
    owner.generation_config = GenerationConfig()
    try:
        return [_answer(model, inputs, image_token) for inputs in batches]
    finally:
        owner.generation_config = own


def _answer(model, inputs: dict, image_token: int) -> Answer | None:
    if not inputs or not inputs["input_ids"].numel():
        return None
    generated = model.generate(**inputs, **GREEDY)
    ids = inputs["input_ids"]
    logits = model(**inputs).logits[0].float()
    return Answer(placed(ids, image_token), inputs.get("pixel_values"), logits, generated[0, ids.shape[1] :])


def difference(ones: list[Answer | None], others: list[Answer | None]) -> Difference:
    """Return how far two models' answers are apart; ValueError if there is no conversation that both have room for."""
    pairs = [(one, other) for one, other in zip(ones, others, strict=True) if one is not None and other is not None]
    if not pairs:
        raise ValueError("neither model has room for any of the questions; nothing can be compared.")
    same_ids = all(torch.equal(one.input_ids, other.input_ids) for one, other in pairs)
    images = [(one.pixel_values, other.pixel_values) for one, other in pairs if has_images(one)]
    return Difference(
        same_ids=same_ids,
        pixels=max((largest(one, other) for one, other in images), default=0.0),
        logits=max(largest(*_same_width(one.logits, other.logits)) for one, other in pairs),
        same_tokens=all(torch.equal(one.tokens, other.tokens) for one, other in pairs),
    )


def has_images(answer: Answer) -> bool:
    """Return whether a model was asked about images; with mm_injection adaption_prompt a text has an empty tensor."""
    return answer.pixel_values is not None and len(answer.pixel_values) > 0


def largest(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """Return the largest difference of two tensors, infinite where one is missing or has another shape."""
    if one is None or other is None or one.shape != other.shape:
        return float("inf")
    gap = (one.float() - other.float()).abs().max().item()
    return gap if gap == gap else float("inf")


def _same_width(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both to the smaller vocabulary: a converted one may have rows for new tokens."""
    width = min(one.shape[-1], other.shape[-1])
    return one[..., :width], other[..., :width]
