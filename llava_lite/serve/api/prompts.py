"""Turn a chat request into answers that an engine can generate: its prompt and images as the model's inputs."""

import torch

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.inference import check_sees
from llava_lite.serve.api.answer import Answer, Ends
from llava_lite.serve.api.batch import get_context_len
from llava_lite.serve.api.chat_request import ChatRequest, ImageURL
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits
from llava_lite.serve.api.sampling import Sampling
from llava_lite.serve.api.text_bound import TextBound


class Prompts:
    """What turns requests for one model into answers; threads may share it.

    limits: of the images. default_max_tokens: of an answer whose request names no number.
    """

    def __init__(self, model, processor, limits: ImageLimits, default_max_tokens: int = 512):
        self.model, self.processor, self.limits = model, processor, limits
        self.default_max_tokens = default_max_tokens
        self.ends = Ends.of(model, processor)
        self.context_len = get_context_len(model.config)
        self._bound = TextBound(processor.tokenizer)

    def answers(self, asked: ChatRequest, images: list, sends: list) -> list[Answer]:
        """Return the answers of a request, to be generated; RequestError for a prompt that the model cannot take.

        images: those of the request, in order, upright and as RGB. sends: for each answer what takes its events.
        """
        inputs = self._inputs(asked, images)
        max_tokens = self._max_tokens(asked, inputs["input_ids"].shape[1])
        return [
            Answer(
                inputs=inputs,
                sampling=Sampling(asked.temperature, asked.top_p, seed, self.model_device),
                ends=self.ends,
                decode=self.processor.decode,
                send=send,
                max_new_tokens=max_tokens,
                stops=asked.stops,
                num_top=asked.num_top,
            )
            for seed, send in zip(asked.seeds(), sends, strict=True)
        ]

    @property
    def model_device(self) -> torch.device:
        """The device of ids and scores; weights that accelerate loads when they are needed have none."""
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

    def check_images(self, asked: ChatRequest) -> None:
        """Raise RequestError for images that are too many, or for a model that sees none."""
        count = len(asked.images())
        try:
            check_sees(self.processor, count > 0)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        if count > self.limits.max_images:
            message = f"The messages have {count} images; this server takes at most {self.limits.max_images}."
            raise RequestError(message, param="messages", code="too_many_images")

    def check_len(self, asked: ChatRequest) -> None:
        """Raise RequestError for messages that are longer than the context whatever their tokens are.

        The prompt is written, as a format may drop parts of the messages, and not tokenized, which takes longer.
        """
        prompt = self._apply(asked, [None] * len(asked.images()), tokenize=False)
        least = self._bound.least_tokens(prompt.replace(DEFAULT_IMAGE_TOKEN, ""), self.context_len)
        if least >= self.context_len:
            raise self._too_long(f"at least {least:,}", asked.max_tokens)

    def _inputs(self, asked: ChatRequest, images: list) -> dict:
        """Return the inputs of the model, on its device, as `inference.reply` makes them."""
        inputs = self._apply(asked, images, tokenize=True, return_dict=True)
        return dict(inputs.to(self.model_device, dtype=self.model.dtype))

    def _apply(self, asked: ChatRequest, images: list, **how):
        left = iter(images)
        messages = [
            {"role": role, "content": [as_part(part, left) for part in parts]} for role, parts in asked.messages
        ]
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, **how)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error

    def _max_tokens(self, asked: ChatRequest, prompt_len: int) -> int:
        """Return how long an answer may become; RequestError if prompt and answer do not fit into the context."""
        room = self.context_len - prompt_len
        wanted = asked.max_tokens
        if room < (wanted or 1):
            raise self._too_long(f"{prompt_len:,}", wanted)
        return min(room, self.default_max_tokens) if wanted is None else wanted

    def _too_long(self, prompt_len: str, wanted: int | None) -> RequestError:
        answer = "no place for an answer" if wanted is None else f"max_tokens is {wanted:,}"
        message = f"This model's context is {self.context_len:,} tokens; the messages have {prompt_len} and "
        message += f"{answer}. Send fewer or shorter messages, fewer images, or ask for a shorter answer."
        return RequestError(message, param="messages", code="context_length_exceeded")


def as_part(part: str | ImageURL, images) -> dict:
    """Return a part of a message as the processor takes it. images: iterator; None for an image that is not read."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    image = next(images)
    return {"type": "image"} | ({} if image is None else {"image": image})
