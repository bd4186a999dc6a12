"""Turn the next question of a conversation into pieces of an answer, one visitor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava_lite.inference import prepare, stream
from llava_lite.media_inputs import known_kinds
from llava_lite.model.builder import context_len
from llava_lite.model.fusion.image_cache import ImageFeatureCache
from llava_lite.serve.demo_conversation import Ask, Conversation
from llava_lite.serve.sampling import sampling

# Takes the place of media where tokens are counted.
STAND_IN = Image.new("RGB", (8, 8))


class _Count(StoppingCriteria):
    """Count the tokens of one answer, and stop nothing."""

    num_tokens = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Settings:
    """How an answer is generated. template: None for the model's own. seed: None for another answer every time."""

    template: str | None = None
    temperature: float = 0.2
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass(eq=False)
class DemoModel:
    """A loaded model that many visitors ask.

    name: as the page shows it. lock: held while a model computes; models of one device share it. routes: the function
    `routes` of eval.expert_routes, for a model with experts; None for others.
    """

    name: str
    model: Any
    processor: Any
    lock: Lock
    routes: Callable | None = None
    image_cache: ImageFeatureCache = field(default_factory=ImageFeatureCache)

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of files that it reads."""
        return known_kinds(self.model)

    @property
    def context_len(self) -> int:
        """Return how many tokens a conversation may have, images and the answer included."""
        return context_len(self.model.config)

    def answer(self, conversation: Conversation, ask: Ask, settings: Settings) -> Iterator[None]:
        """Add a question to a conversation and its answer, piece by piece; yield after each.

        A turn without an answer is taken out at the end, for few prompt formats have a place for one; so is the turn
        of an error, which is raised here. Closing the iterator stops the model and keeps what was answered.
        """
        turn, images, media = conversation.begin(ask, self.kinds, self.name)
        history = conversation.history
        processors = sampling(settings.temperature, settings.top_p, settings.seed)
        longest = self.longest_answer(turn.question, images if media is None else [STAND_IN], history, settings)
        count = _Count()
        conversation.turns.append(turn)
        try:
            yield
            with self.lock:
                pieces = stream(
                    self.model,
                    self.processor,
                    turn.question,
                    images,
                    settings.template,
                    history,
                    longest,
                    image_cache=self.image_cache,
                    media=media,
                    logits_processor=processors,
                    stopping_criteria=[count],
                )
                try:
                    for piece in pieces:
                        turn.answer += piece
                        yield
                finally:
                    pieces.close()
            if count.num_tokens >= longest < settings.max_new_tokens:
                turn.remark = (
                    f"{self.name} ended its answer after {longest:,} tokens, where the {self.context_len:,} that it "
                    "reads are full; start a new conversation."
                )
        finally:
            if not turn.answer and turn in conversation.turns:
                conversation.turns.remove(turn)

    def longest_answer(self, question, images, history, settings: Settings) -> int:
        """Return how many tokens an answer may have: the maximum of new tokens, or what the context has left.

        Raises ValueError for a conversation that leaves nothing.
        """
        inputs, _ = prepare(self.processor, [question], [images], settings.template, [history])
        length = inputs["input_ids"].shape[1]
        if length >= self.context_len:
            raise ValueError(
                f"the conversation has {length:,} tokens, images included, and {self.name} reads "
                f"{self.context_len:,} with its answer; start a new conversation."
            )
        return min(settings.max_new_tokens, self.context_len - length)

    def last_routes(self, conversation: Conversation, settings: Settings) -> dict | None:
        """Return what `routes` counts of the prompt of the last turn; None without experts, turns or with media."""
        if self.routes is None or not conversation.turns:
            return None
        *earlier, turn = conversation.turns
        uploads = conversation.uploads(Ask(""))
        if any(upload.kind != "image" for upload in uploads):
            return None
        with self.lock:
            return self.routes(
                self.model,
                self.processor,
                turn.question,
                [Path(upload.path) for upload in uploads],
                settings.template,
                [(one.question, one.answer) for one in earlier],
            )
