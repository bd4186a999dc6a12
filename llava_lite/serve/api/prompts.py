"""Turn a chat request into answers that an engine can generate: its prompt and images as the model's inputs."""

import torch

from llava_lite.inference import check_sees
from llava_lite.serve.api.answer import Answer, Ends
from llava_lite.serve.api.batch import get_context_len
from llava_lite.serve.api.chat_request import ChatRequest, ImageURL
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits, read_image
from llava_lite.serve.api.sampling import Sampling


class Prompts:
    """What turns requests for one model into answers; threads may share it.

    limits: of the images. default_max_tokens: of an answer whose request names no number.
    """

    def __init__(self, model, processor, limits: ImageLimits, default_max_tokens: int = 512):
        self.model, self.processor, self.limits = model, processor, limits
        self.default_max_tokens = default_max_tokens
        self.ends = Ends.of(model, processor)
        self.context_len = get_context_len(model.config)

    def answers(self, asked: ChatRequest, sends: list) -> list[Answer]:
        """Return the answers of a request, to be generated; RequestError for a prompt that the model cannot take.

        sends: for each answer what takes its events. Images are fetched and decoded here, which may take seconds.
        """
        inputs = self._inputs(asked)
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

    def _inputs(self, asked: ChatRequest) -> dict:
        """Return the inputs of the model, on its device, as `inference.reply` makes them."""
        self._check_images(asked)
        messages = [{"role": role, "content": [self._part(part) for part in parts]} for role, parts in asked.messages]
        try:
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        return dict(inputs.to(self.model_device, dtype=self.model.dtype))

    def _check_images(self, asked: ChatRequest) -> None:
        """Refuse images that are too many before any is fetched."""
        count = sum(isinstance(part, ImageURL) for _, parts in asked.messages for part in parts)
        try:
            check_sees(self.processor, count > 0)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        if count > self.limits.max_images:
            message = f"The messages have {count} images; this server takes at most {self.limits.max_images}."
            raise RequestError(message, param="messages", code="too_many_images")

    def _part(self, part: str | ImageURL) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": read_image(part, self.limits)}

    def _max_tokens(self, asked: ChatRequest, prompt_len: int) -> int:
        """Return how long an answer may become; RequestError if prompt and answer do not fit into the context."""
        room = self.context_len - prompt_len
        wanted = asked.max_tokens
        if room < (wanted or 1):
            answer = "no place for an answer" if wanted is None else f"max_tokens is {wanted:,}"
            message = f"This model's context is {self.context_len:,} tokens; the messages have {prompt_len:,} and "
            message += f"{answer}. Send fewer or shorter messages, fewer images, or ask for a shorter answer."
            raise RequestError(message, param="messages", code="context_length_exceeded")
        return min(room, self.default_max_tokens) if wanted is None else wanted
