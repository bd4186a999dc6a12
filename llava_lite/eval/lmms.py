"""The classes of lmms-eval's registry: chat requests, and simple ones with the losses of given answers.

Imported by lmms-eval alone, once `--model llava_lite` is chosen; see lmms_manifest.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from llava_lite.eval.lmms_model import AnsweringModel, Request
from llava_lite.eval.lmms_requests import to_messages


class LlavaLite(AnsweringModel, lmms):
    """What both classes share. Keywords: as in AnsweringModel.open, by --model_args "pretrained=DIRECTORY,..."."""

    def __init__(self, pretrained: str | None = None, **options):
        lmms.__init__(self)
        if pretrained is None:
            raise ValueError("no model; name its directory or hub id: --model_args pretrained=checkpoints/llava.")
        self.open(pretrained, **options)

    @property
    def rank(self) -> int:
        """Return the rank of this process, which lmms-eval sets."""
        return self._rank

    def document(self, task: str, split: str, doc_id: int) -> Any:
        """Return a document of a task."""
        return self.task_dict[task][split][doc_id]


class LlavaLiteChat(LlavaLite):
    """Answers messages, several images and earlier turns among them."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, in the order given."""
        return self.answer([self.to_request(request) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Return the answers of all rounds of each request; the task writes a round's messages from those before."""
        return [self.rounds(request) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise an error: lmms-eval gives chat models no continuations."""
        raise NotImplementedError("losses of given answers come from the simple class: add --force_simple.")

    def to_request(self, request: Any, messages: Any = None) -> Request:
        """Return a request of lmms-eval as one of ours; messages: in place of those that the task writes."""
        context, doc_to_messages, gen_kwargs, doc_id, task, split = request.args

        def read() -> Any:
            return doc_to_messages(self.document(task, split, doc_id)) if messages is None else messages

        return Request(f"{task}, document {doc_id}", context, gen_kwargs or {}, read)

    def rounds(self, request: Any) -> list[str]:
        """Return the answers to one document, round by round, until the task says that it is done."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        document = self.document(task, split, doc_id)
        answers: list[str] = []
        messages, info = doc_to_messages(document), None
        while True:
            answers += self.answer([self.to_request(request, messages)])
            found = doc_to_messages(
                document, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
            )
            if not isinstance(found, tuple) or len(found) != 4 or found[1]:
                return answers
            messages, _, _, info = found


class LlavaLiteSimple(LlavaLite):
    """Answers a text with visuals in front of it, and measures the loss of given answers (--force_simple)."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, in the order given."""
        return self.answer([self.to_request(*request.args) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Raise an error: rounds are for the chat class."""
        raise NotImplementedError("tasks of several rounds are for the chat class: leave --force_simple out.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return (loss, is greedy) of each continuation, in the order given; lmms-eval picks the lowest loss."""
        asked, continuations = [], []
        for request in requests:
            # Those without a document, of acc_mutual_info, are a context and a continuation.
            context, continuation, *where = request.args
            doc_to_visual, *place = where or [None, None, "", ""]
            asked.append(self.to_request(context, {}, doc_to_visual, *place))
            continuations.append(self.to_continuation(continuation, *place))
        # lmms-eval (0.7.3, api/instance.py) turns a bare pair into its text, on which its tasks then fail; what is
        # inside a GenerationResult reaches them as it is.
        return [GenerationResult(pair) for pair in self.losses(asked, continuations)]

    def to_continuation(self, continuation: Any, doc_id: Any, task: str, split: str) -> Callable[[], str]:
        """Return a function that returns the text of a continuation, which may itself be one of the document."""
        if callable(continuation):
            return lambda: str(continuation(self.document(task, split, doc_id)))
        return lambda: continuation

    def to_request(self, context, gen_kwargs, doc_to_visual, doc_id, task, split) -> Request:
        """Return a request of lmms-eval as one of ours."""

        def read() -> list[dict[str, Any]]:
            visuals = doc_to_visual(self.document(task, split, doc_id)) if doc_to_visual is not None else []
            return to_messages(context, visuals)

        return Request(f"{task}, document {doc_id}", context, gen_kwargs or {}, read)
