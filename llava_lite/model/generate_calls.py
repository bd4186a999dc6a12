"""Read the arguments of a call of `generate`: its mask, its positions, its cache; and leave the model as it was.

B sequences, T tokens before images are expanded, K cached positions.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch

from llava_lite.model.fusion.splice import Batch, expand_placeholders, positions_from_mask

logger = logging.getLogger(__name__)

# Options of `generate` that need prompt token ids, with the value that disables each: they read the ids and never the
# embeddings, or take no embeddings beside ids.
BY_IDS = {"assistant_model": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
BY_IDS |= {"prefill_chunk_size": None, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
BY_IDS |= {"guidance_scale": 1.0}


class GenerateCalls:
    """The arguments of `generate` that need the generation config of the model."""

    def infer_mask(self, input_ids: torch.Tensor, arguments: dict) -> torch.Tensor | None:
        """Return the mask [B, T] of ids without one: zeros at padding ids, unless the padding id ends an answer too.

        This is transformers' rule, which transformers itself would apply to the expanded ids.
        """
        pad, ends = self.argument("pad_token_id", arguments), self.argument("eos_token_id", arguments)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is not None and pad not in ends:
            mask = (input_ids != pad).long()
            return None if bool(mask.all()) else mask
        if len(input_ids) > 1:
            logger.warning(
                "generate got %d sequences and no attention_mask, and the ids do not show what is padding: "
                "pad_token_id is %s, eos_token_id %s. Every id counts as text; give the attention_mask "
                "of the processor.",
                *(len(input_ids), pad, ends),
            )
        return None

    def find_id_options(self, arguments: dict) -> list[str]:
        """Return the enabled options that need the prompt in a cache and not as embeddings; see BY_IDS."""
        given = {name: self.argument(name, arguments) for name in BY_IDS}
        return [name for name, value in given.items() if value is not None and value != BY_IDS[name]]

    def argument(self, name: str, arguments: dict):
        """Return an argument of `generate`, given by name or in a generation config; None if it is in neither."""
        config = arguments.get("generation_config") or self.generation_config
        return arguments.get(name, getattr(config, name, None))


# Models in training mode that generate: the number of running calls, and the modules to put back in training mode.
_EVALUATING: WeakKeyDictionary = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def evaluating(model):
    """Keep a model in evaluation mode while any call is in the block; then each module returns to its own mode."""
    with _LOCK:
        count, modules = _EVALUATING.get(model, (0, None))
        if modules is None:
            modules = [module for module in model.modules() if module.training]
        for module in modules:
            module.training = False
        _EVALUATING[model] = count + 1, modules
    try:
        yield
    finally:
        with _LOCK:
            count, modules = _EVALUATING.pop(model)
            if count > 1:
                _EVALUATING[model] = count - 1, modules
            else:
                for module in modules:
                    module.training = True


def cached_len(arguments: dict) -> int:
    """Return the number of positions in the cache that `generate` was given; 0 without one."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def counts_as_usual(positions: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether position_ids [B, T] count the real tokens of each sequence from 0, which is the default."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions.shape[-1] > mask.shape[1]:
        return False
    usual, real = (values[:, -positions.shape[-1] :] for values in (positions_from_mask(mask), mask.bool()))
    return bool((positions.to(usual.device) == usual)[real].all())


def check_continues(batch: Batch, num_cached: int) -> bool:
    """Return whether the ids [B, T] of a call with a cache are all ids; False for the new ones alone.

    Raises ValueError if they are neither, by the length of the mask.
    """
    num_ids = batch.input_ids.shape[1]
    mask_len = num_ids if batch.attention_mask is None else batch.attention_mask.shape[1]
    if mask_len == num_ids:
        if batch.attention_mask is None and num_ids > num_cached:
            logger.warning(
                "generate got %d ids, a cache of %d positions and no attention_mask: these count as all ids, of which "
                "the last %d are new. If all are new, give an attention_mask of %d.",
                *(num_ids, num_cached, num_ids - num_cached, num_cached + num_ids),
            )
        return True
    if mask_len != num_cached + num_ids:
        raise ValueError(
            f"{num_ids} ids, an attention_mask of {mask_len} and a cache of {num_cached} positions; expected all ids "
            f"and a mask as long, or new ids and a mask of {num_cached + num_ids}."
        )
    return False


def without_prompt(output, prompt_len: int):
    """Return the output of `generate`, ids [B, L + new] or an object that holds them, with new tokens only."""
    if isinstance(output, torch.Tensor):
        return output[:, prompt_len:]
    output.sequences = output.sequences[:, prompt_len:]
    return output


def pad_rows_left(batch: Batch) -> Batch:
    """Move the padding of each sequence to its left; generation appends on the right."""
    if batch.attention_mask is None or bool(batch.attention_mask[:, -1].all()):
        return batch
    never = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    return expand_placeholders(batch, never, [], pad_left=True)
