"""Answer the requests of lmms-eval with a model of this package: in batches, in the order in which they came.

Nothing of lmms-eval is imported here: lmms.py makes its classes of this one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import StoppingCriteriaList

from llava_lite.eval.likelihood import answer_losses
from llava_lite.eval.lmms_requests import Asked, Settings, as_media, cut_at, in_batches, to_asked, to_settings
from llava_lite.inference import load, reply
from llava_lite.mm_utils import KeywordsStoppingCriteria

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """One request. name: for errors. read: returns its messages; called when it is asked, since it may open images."""

    name: str
    context: str
    gen_kwargs: dict[str, Any]
    read: Callable[[], list[dict[str, Any]]]


class AnsweringModel:
    """A model, and how it answers. task_dict is filled by lmms-eval: task -> split -> documents."""

    task_dict: dict[str, Any]
    # lmms-eval sets it where there are several ranks.
    rank = 0

    def open(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str | None = None,
        model_base: str | None = None,
        revision: str | None = None,
        conv_template: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        stop_at_blank_line: bool = False,
    ) -> None:
        """Load a model by the arguments of --model_args, of which batch_size and device are flags of lmms-eval too.

        conv_template: None for the checkpoint's own. stop_at_blank_line: see to_settings. max_batch_size: lmms-eval's,
        for batches of a size that is found; not read.
        """
        self.batch_size = to_batch_size(batch_size)
        self.conv_template, self.stop_at_blank_line = conv_template, stop_at_blank_line
        more = {name: value for name, value in (("load_8bit", load_8bit), ("load_4bit", load_4bit)) if value}
        more |= {"revision": str(revision)} if revision is not None else {}
        self.model, self.processor = load(str(pretrained), device_of_rank(device), dtype, model_base, **more)
        self.device = self.model.device
        # Before the first question: an unknown template is named with those that are known.
        self.processor.template(conv_template)
        self.reported: set[str] = set()

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Return the answer to each request, without the text that ends it."""
        answers = [""] * len(requests)
        contexts, gen_kwargs = [request.context for request in requests], [request.gen_kwargs for request in requests]
        with tqdm(total=len(requests), desc="llava_lite", disable=self.rank > 0 or len(requests) == 1) as bar:
            for batch in in_batches(contexts, gen_kwargs, self.batch_size):
                chosen = [requests[position] for position in batch]
                with naming(chosen):
                    settings = to_settings(chosen[0].gen_kwargs, self.stop_at_blank_line)
                    self.report_unknown(settings.unknown)
                    asked = [to_asked(request.read()) for request in chosen]
                    texts = self.ask(asked, settings)
                for position, text in zip(batch, texts, strict=True):
                    answers[position] = cut_at(text, settings.until)
                bar.update(len(batch))
        return answers

    def ask(self, asked: Sequence[Asked], settings: Settings) -> list[str]:
        """Return the answers to a batch; questions about sounds and videos are asked one by one."""
        if len(asked) > 1 and any(one.media for one in asked):
            return [self.ask([one], settings)[0] for one in asked]
        if asked[0].media:
            return [self.ask_about_media(asked[0], settings)]
        return reply(
            self.model,
            self.processor,
            [one.question for one in asked],
            [list(one.images) for one in asked],
            history=[list(one.history) for one in asked],
            **self.generation(settings),
        )

    def ask_about_media(self, one: Asked, settings: Settings) -> str:
        """Return the answer to a question about sounds or videos, and one image at most."""
        if len(one.images) > 1:
            raise ValueError(
                f"{len(one.images)} images beside {', '.join(one.media)}; a model with ImageBind reads one of each."
            )
        media = dict(one.media) | ({"image": as_media(one.images[0])} if one.images else {})
        history, given = list(one.history), self.generation(settings)
        return reply(self.model, self.processor, one.question, media=media, history=history, **given)

    def generation(self, settings: Settings) -> dict[str, Any]:
        """Return the keywords of one call of `reply`."""
        given = {"conv_template": self.conv_template} | settings.arguments
        if settings.until:
            stop = KeywordsStoppingCriteria(settings.until, self.processor.tokenizer)
            given["stopping_criteria"] = StoppingCriteriaList([stop])
        return given

    def report_unknown(self, names: Sequence[str]) -> None:
        """Log once which generation settings are left out."""
        left_out = [name for name in names if name not in self.reported]
        if left_out and self.rank == 0:
            logger.warning(
                "Generation settings that llava_lite does not have, left out: %s. Images are prepared, and prompts "
                "written, as the checkpoint says.",
                ", ".join(left_out),
            )
        self.reported.update(left_out)

    def losses(
        self, requests: Sequence[Request], continuations: Sequence[Callable[[], str]]
    ) -> list[tuple[float, bool]]:
        """Return (loss, is greedy) of the continuation of each request; see answer_losses."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        contexts = [request.context for request in requests]
        with tqdm(total=len(requests), desc="llava_lite", disable=self.rank > 0 or len(requests) == 1) as bar:
            for batch in in_batches(contexts, [{}] * len(requests), self.batch_size):
                chosen = [requests[position] for position in batch]
                with naming(chosen):
                    asked = [to_asked(request.read()) for request in chosen]
                    losses = self.measure(asked, [continuations[position]().strip() for position in batch])
                for position, loss in zip(batch, losses, strict=True):
                    found[position] = loss
                bar.update(len(batch))
        return found

    def measure(self, asked: Sequence[Asked], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Return (loss, is greedy) of a given answer to each of a batch of questions."""
        if any(one.media for one in asked):
            raise ValueError("the loss of an answer about sounds or videos is not there; ask for its text instead.")
        return answer_losses(
            self.model,
            self.processor,
            [one.question for one in asked],
            [list(one.images) for one in asked],
            answers,
            self.conv_template,
            [list(one.history) for one in asked],
        )


def to_batch_size(size: int | str) -> int:
    """Return --batch_size as a number; ValueError for another, `auto` among them."""
    try:
        number = int(size)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"batch_size is {size!r}; llava_lite takes a whole number of at least 1: --batch_size 8.")
    return number


def device_of_rank(device: str | None) -> str | None:
    """Return the device of this process: of several on GPUs each has its own."""
    is_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    if is_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


@contextmanager
def naming(requests: Sequence[Request]) -> Iterator[None]:
    """Put the names of a batch's documents in front of an error that one of them causes."""
    try:
        yield
    except (OSError, ValueError) as error:
        names = ", ".join(dict.fromkeys(request.name for request in requests))
        raise ValueError(f"{names}: {error}") from error
