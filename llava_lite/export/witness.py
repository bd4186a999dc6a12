"""Turn a model and its processor into answers to fixed questions, and two sets of answers into their differences.

A checkpoint that was rewritten is opened again and asked the same; L tokens of a prompt, V of the vocabulary.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import GenerationConfig

NUM_NEW_TOKENS = 12
# No answer ends early, since that would tell nothing of the tokens after it; any one id may stand for the end.
GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
GREEDY |= {"eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Answer:
    """What a model read and said. pixel_values: None without pictures; tokens: the greedy ones, [NUM_NEW_TOKENS]."""

    input_ids: torch.Tensor  # [L], -1 where a picture stands
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
        """Tell whether the two say the same within `tolerance` of a logit."""
        return self.same_ids and self.same_tokens and self.logits <= tolerance and self.pixels <= tolerance


def talks(with_pictures: bool = True) -> list[list[dict]]:
    """Return the questions as messages: about a wide picture, in a longer talk, with two pictures, with none."""
    wide, tall = draw(90, 61), draw(47, 80)
    asked = [{"role": "user", "content": [{"type": "text", "text": "Who wrote the first book about it?"}]}]
    if not with_pictures:
        return [asked]
    longer = [
        {"role": "user", "content": [_shown(tall), {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A pattern of three colours."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which one is the brightest?"}]},
    ]
    two = [_shown(wide), _shown(tall), {"type": "text", "text": "Compare the two pictures."}]
    return [
        [{"role": "user", "content": [_shown(wide), {"type": "text", "text": "Describe the picture in detail."}]}],
        longer,
        [{"role": "user", "content": two}],
        asked,
    ]


def draw(width: int, height: int) -> Image.Image:
    """Return a picture of slopes and waves of its own size, always the same."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")  # [H, W]
    colours = torch.stack([255 * x // width, 255 * y // height, (x * y) % 256], dim=-1).to(torch.uint8)
    return Image.fromarray(colours.numpy(), "RGB")


def _shown(picture: Image.Image) -> dict:
    return {"type": "image", "image": picture}


def read(processor, messages) -> dict:
    """Return the inputs that a processor makes of messages, {} where its format has no room for them."""
    try:
        return dict(
            processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
            )
        )
    except ValueError as error:
        if "nothing is left" in str(error):
            return {}
        raise


def readings(processor, with_pictures: bool = True) -> list[dict]:
    """Return the inputs of every talk."""
    return [read(processor, messages) for messages in talks(with_pictures)]


def placed(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """Return the ids [L] with -1 where a picture stands, whatever its placeholder is."""
    return input_ids[0].masked_fill(input_ids[0] == image_token, -1)


@torch.no_grad()
def answers(model, batches: list[dict], image_token: int) -> list[Answer | None]:
    """Return what a model, in eval mode, answers to the inputs of `readings`; None where its format has no room."""
    # PEFT's model hands its generation config to the one inside for good.
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
    """Return how far two models' answers are apart; ValueError if there is no talk that both have room for."""
    pairs = [(one, other) for one, other in zip(ones, others, strict=True) if one is not None and other is not None]
    if not pairs:
        raise ValueError("neither model has room for any of the questions; nothing can be compared.")
    same_ids = all(torch.equal(one.input_ids, other.input_ids) for one, other in pairs)
    pictures = [(one.pixel_values, other.pixel_values) for one, other in pairs if one.pixel_values is not None]
    return Difference(
        same_ids=same_ids,
        pixels=max((largest(one, other) for one, other in pictures), default=0.0),
        logits=max(largest(*_same_width(one.logits, other.logits)) for one, other in pairs),
        same_tokens=all(torch.equal(one.tokens, other.tokens) for one, other in pairs),
    )


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
