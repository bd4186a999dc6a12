"""Generate answers side by side: sequences join a left-padded batch and leave it between any two steps.

A prompt is read alone, exactly as `inference.reply` reads it; only decode steps are shared. A token that rounding in a
batch might have changed is not taken: its answer leaves the batch and is generated again alone. So an answer does not
depend on who else is asked. B sequences, L positions, V words.
"""

import logging

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llava_lite.model.builder import context_len
from llava_lite.serve.api.answer import Answer
from llava_lite.serve.api.sampling import RouterWatch, lead, rounding_error

logger = logging.getLogger(__name__)

# Fields of a generation config that count positions from where a call of `generate` begins.
COUNTING = ("begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id")
COUNTING += ("min_length", "min_new_tokens", "no_repeat_ngram_size")


def why_alone(model) -> str | None:
    """Return why the answers of a model can only be generated one after another; None if they can share a batch."""
    config = model.config
    if getattr(config, "has_prompts", False):
        return "its images are in the attention (mm_injection adaption_prompt)"
    blocks = model.moe_layers().values() if hasattr(model, "moe_layers") else ()
    if any(block.moe.moe_drop_tokens for block in blocks):
        return "its experts drop tokens above a capacity, which depends on the batch (moe_drop_tokens)"
    if any(block.moe.moe_second_expert_sampling == "always" for block in blocks):
        return "its second expert is drawn at random (moe_second_expert_sampling)"
    if getattr(model, "is_loaded_in_8bit", False):
        return "in 8 bit it rounds the columns of a whole batch alike"
    counting = [name for name in COUNTING if getattr(model.generation_config, name, None)]
    if counting:
        return f"its generation_config.json has {', '.join(counting)}, which count from the beginning of a call"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers if not keeps_all(layer, config)}
    return f"its cache has layers of the kind {', '.join(sorted(kinds))}" if kinds else None


def keeps_all(layer, config) -> bool:
    """Return whether a layer of a cache keeps every position of a prompt and its answer, in two plain tensors."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window >= get_context_len(config)
    return type(layer) is DynamicLayer


def get_context_len(config) -> int:
    """Return how many tokens a prompt and its answer may have together: those of training, and of the decoder."""
    lengths = (context_len(config), getattr(config, "max_position_embeddings", None))
    return min(length for length in lengths if length is not None)


class Batch:
    """The answers that are being generated side by side. One thread owns it, and the model meanwhile.

    pad_token_id: of the processor. is_exact: generate an answer again alone where rounding might have changed it.
    """

    def __init__(self, model, pad_token_id: int, is_exact: bool = True):
        self.model, self.pad_token_id, self.is_exact = model, pad_token_id, is_exact
        self.answers: list[Answer] = []
        self.doubtful: list[Answer] = []
        self._ids = self._mask = self._cache = None

    def read(self, answer: Answer) -> None:
        """Generate the first token of an answer alone, and let it join the batch if it goes on."""
        output = self._generate([answer], answer.inputs, max_new_tokens=1, return_dict_in_generate=True)
        if answer.is_over:
            return
        ids = output.sequences.clone()
        # A placeholder that is a word of its own would ask for images again, which are in the cache.
        ids[ids == self.model.config.image_token_index] = self.pad_token_id
        self._join(answer, ids, output.past_key_values)

    def run_alone(self, answer: Answer) -> None:
        """Generate a whole answer alone, from its beginning: one call of `generate`, as that of `reply`."""
        answer.restart()
        self._generate([answer], answer.inputs, max_new_tokens=answer.max_new_tokens)

    def run(self, is_wanted, after_step) -> list[Answer]:
        """Go on until an answer ends; return those that have left the batch, `doubtful` ones to be run alone.

        is_wanted: asked after each step; False ends the call too, and nothing is lost. after_step: called with the
        number of sequences of each step.
        """
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, "past_key_values": self._cache}
        longest = max(answer.max_new_tokens - len(answer.tokens) for answer in self.answers)
        output = self._generate(
            self.answers,
            inputs,
            max_new_tokens=longest,
            return_dict_in_generate=True,
            is_wanted=is_wanted,
            after_step=after_step,
        )
        new = output.sequences.shape[1] - self._ids.shape[1]
        self._ids, self._cache = output.sequences, output.past_key_values
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), new)], dim=1)
        gone = [answer for answer in self.answers if answer.is_over or answer in self.doubtful]
        self._leave(gone)
        return gone

    def clear(self) -> list[Answer]:
        """Let all answers leave, and return them; for a step that failed."""
        gone, self.answers, self.doubtful = self.answers, [], []
        self._ids = self._mask = self._cache = None
        return gone

    def _generate(self, answers, inputs, is_wanted=lambda: True, after_step=lambda count: None, **arguments):
        # One sequence is computed as `reply` computes it.
        checks = self.is_exact and len(answers) > 1
        with RouterWatch(self.model, checks) as routers:
            step = _Step(self, answers, routers if checks else None, is_wanted, after_step)
            return self.model.generate(
                **inputs,
                **arguments,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                use_cache=True,
                pad_token_id=self.pad_token_id,
                eos_token_id=list(answers[0].ends.ids),
                stop_strings=None,
                logits_processor=LogitsProcessorList([_Choose(step)]),
                stopping_criteria=StoppingCriteriaList([_Stop(step)]),
            )

    def _join(self, answer: Answer, ids, cache) -> None:
        mask = torch.ones_like(ids)
        if self.answers:
            length = max(ids.shape[1], self._ids.shape[1])
            # An id of the sequence itself: a repetition penalty must not learn of another one.
            own = pad_left(self._ids, length, self._ids[:, -1:]), pad_left(self._mask, length, 0)
            its = pad_left(ids, length, ids[:, -1:]), pad_left(mask, length, 0)
            ids, mask = (torch.cat(pair) for pair in zip(own, its, strict=True))
            cache = join_caches(self._cache, cache, length - 1)
        self.answers.append(answer)
        self._ids, self._mask, self._cache = ids, mask, cache

    def _leave(self, gone: list[Answer]) -> None:
        kept = [i for i, answer in enumerate(self.answers) if answer not in gone]
        self.answers = [self.answers[i] for i in kept]
        if not kept:
            self._ids = self._mask = self._cache = None
        elif gone:
            rows = torch.tensor(kept, device=self._ids.device)
            ids, mask = self._ids[rows], self._mask[rows]
            # Columns that are padding for all who stay.
            start = int(mask.any(0).int().argmax())
            self._ids, self._mask = ids[:, start:], mask[:, start:]
            self._cache = DynamicCache([(k[rows, :, start:], v[rows, :, start:]) for k, v in tensors_of(self._cache)])


class _Step:
    """What the two hooks of `generate` share: who is asked, and what the last step chose for each."""

    def __init__(self, batch: Batch, answers, routers: RouterWatch | None, is_wanted, after_step):
        self.batch, self.answers, self.routers = batch, list(answers), routers
        self.is_wanted, self.after_step = is_wanted, after_step
        self.is_stopped = False
        self.chosen: list[tuple[int, bool, list | None]] = []

    def choose(self, scores: torch.Tensor) -> list[int]:
        """Choose a token for each answer from its scores [B, V]."""
        tokens = scores.argmax(-1).tolist()
        if self.routers is None:
            errors = certain = routed = None
        else:
            error = rounding_error(scores, self.batch.model.dtype)
            errors, certain = error.tolist(), (lead(scores) > error).tolist()
            routed = self.routers.certain(len(scores)).tolist()
        self.chosen = []
        for i, answer in enumerate(self.answers):
            token, is_certain = tokens[i], errors is None or certain[i]
            if not answer.sampling.is_greedy:
                token, is_certain = answer.sampling.draw(scores[i], None if errors is None else errors[i])
            is_certain = is_certain and (routed is None or routed[i])
            self.chosen.append((token, is_certain, describe(scores[i], token, answer.num_top)))
        return [token for token, *_ in self.chosen]

    def take(self) -> bool:
        """Give each answer its token; return whether the call ends."""
        self.after_step(len(self.answers))
        for answer, (token, is_certain, logprobs) in zip(self.answers, self.chosen, strict=True):
            if answer.is_left:
                continue
            if is_certain:
                answer.add(token, logprobs)
            else:
                self.batch.doubtful.append(answer)
        ends = any(answer.is_over or answer in self.batch.doubtful for answer in self.answers)
        self.is_stopped = ends or not self.is_wanted()
        return self.is_stopped


class _Choose(LogitsProcessor):
    """Leave one word for each sequence."""

    def __init__(self, step: _Step):
        self.step = step

    def __call__(self, input_ids, scores):
        # On some devices transformers makes one step more than was asked for, and takes it back.
        if self.step.is_stopped:
            return scores
        tokens = torch.tensor(self.step.choose(scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stop(StoppingCriteria):
    """Hand the tokens of a step on, and stop all sequences where one of them ends."""

    def __init__(self, step: _Step):
        self.step = step

    def __call__(self, input_ids, scores, **kwargs):
        ends = self.step.is_stopped or self.step.take()
        return torch.full((input_ids.shape[0],), ends, dtype=torch.bool, device=input_ids.device)


def describe(scores: torch.Tensor, token: int, num_top: int | None) -> list[tuple[int, float]] | None:
    """Return (token, log-probability) of a token and then of the `num_top` most probable ones; None if not asked."""
    if num_top is None:
        return None
    logprobs = scores.log_softmax(-1)
    best = logprobs.topk(num_top)
    return [(token, float(logprobs[token])), *zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def pad_left(values: torch.Tensor, length: int, filling) -> torch.Tensor:
    """Return values [B, L] with `filling`, a number or one a sequence [B, 1], on their left up to a length."""
    padded = torch.empty(len(values), length, dtype=values.dtype, device=values.device)
    padded[:] = filling
    padded[:, length - values.shape[1] :] = values
    return padded


def tensors_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values [B, heads, L, D] of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def join_caches(first: DynamicCache, second: DynamicCache, length: int) -> DynamicCache:
    """Return a cache of the sequences of both, padded on the left to a length; the padding is never attended to."""

    def padded(values):
        return torch.nn.functional.pad(values, (0, 0, length - values.shape[2], 0))

    both = zip(tensors_of(first), tensors_of(second), strict=True)
    return DynamicCache(
        [tuple(torch.cat([padded(a), padded(b)]) for a, b in zip(*pair, strict=True)) for pair in both]
    )
