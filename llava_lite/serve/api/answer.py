"""Turn the tokens of one answer, as they come, into its text, in pieces and whole."""

from collections.abc import Callable
from dataclasses import dataclass, field

from llava_lite.conversation.end_tokens import end_ids, get_end_token, stop_arguments
from llava_lite.serve.api.sampling import Sampling

# What tokenizers write for a character of which not all bytes are there yet.
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Ends:
    """Where answers of a model end. ids: tokens; text: end token of the template, or ""; kept: texts that stay."""

    ids: tuple[int, ...]
    text: str
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, model, processor):
        """Return the ends at which `inference.reply` stops too."""
        end = get_end_token(processor.template(), processor.tokenizer)
        stored = model.generation_config
        ids = stop_arguments(end, end_ids(stored, processor.tokenizer), processor.tokenizer)["eos_token_id"]
        kept = stored.stop_strings or ()
        return cls(tuple(ids), end.text, (kept,) if isinstance(kept, str) else tuple(kept))


@dataclass(eq=False)
class Answer:
    """One answer that is being generated; it belongs to the thread of the engine.

    inputs: of the model, for one conversation. stops: texts before which the answer ends. num_top: of how many tokens
    log-probabilities are given, None for none. send: called with an event, see `engine.py`.
    """

    inputs: dict
    sampling: Sampling
    ends: Ends
    decode: Callable
    send: Callable
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    num_top: int | None = None
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    # Set by another thread: nobody reads the answer any more.
    is_left: bool = False
    _num_sent: int = 0
    _num_tokens_sent: int = 0

    @property
    def is_over(self) -> bool:
        """Whether no further token is wanted."""
        return self.reason is not None or self.is_left

    @property
    def prompt_len(self) -> int:
        """Number of tokens of the prompt, those of images included."""
        return self.inputs["input_ids"].shape[1]

    def restart(self) -> None:
        """Forget the tokens, to generate them again; what was sent stays sent."""
        self.tokens, self.reason = [], None
        self.sampling.restart()

    def add(self, token: int, logprobs=None) -> None:
        """Take the next token, and send what is known of the text by now."""
        self.tokens.append(token)
        text = self.decode(self.tokens, skip_special_tokens=True)
        cut, self.reason = self._end(token, text)
        pieces = () if logprobs is None or token in self.ends.ids else (self._describe(logprobs),)
        if len(self.tokens) <= self._num_tokens_sent:
            pieces = ()
        self._num_tokens_sent = max(self._num_tokens_sent, len(self.tokens))
        if self.reason is not None:
            text = text[:cut].strip()
            self.send(("piece", text[self._num_sent :], pieces))
            self.send(("end", text, self.reason, len(self.tokens)))
            return
        ready = text[: len(text) - self._held_len(text)].strip()
        if len(ready) > self._num_sent or pieces:
            self.send(("piece", ready[self._num_sent :], pieces))
            self._num_sent = max(self._num_sent, len(ready))

    def _end(self, token: int, text: str) -> tuple[int | None, str | None]:
        """Return (length of the text that is kept, why the answer ends), None where there is no end."""
        found = [at for stop in (*self.stops, self.ends.text) if stop and (at := text.find(stop)) >= 0]
        if found:
            return min(found), "stop"
        if token in self.ends.ids or any(stop in text for stop in self.ends.kept):
            return None, "stop"
        return None, "length" if len(self.tokens) >= self.max_new_tokens else None

    def _held_len(self, text: str) -> int:
        """Return how much of the end of a text may still change, or be the beginning of what ends the answer."""
        stops = [stop for stop in (*self.stops, self.ends.text) if stop]
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        return max([unfinished, *(overlap(text, stop) for stop in stops)])

    def _describe(self, logprobs) -> dict:
        """Return the entry of OpenAI's `logprobs.content` for the newest token and the most probable ones."""
        before = self.tokens[-2:-1]
        own, *others = [
            {"token": text, "bytes": None if UNFINISHED in text else list(text.encode()), "logprob": value}
            for text, value in ((self._text_after(before, token), value) for token, value in logprobs)
        ]
        return {**own, "top_logprobs": others}

    def _text_after(self, before: list[int], token: int) -> str:
        # A token in front tells a word that begins with a space.
        start, text = self.decode(before), self.decode([*before, token])
        return text[len(start) :] if text.startswith(start) else self.decode([token])


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text with which `stop` begins."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)
