"""Turn token ids and images into new tokens: encode once, splice, and leave the rest to transformers.

Nothing of a call is kept on the model: threads may generate with one model at once. B rows, T tokens before the
splice, L after, K cached positions, D model width.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from llava_lite.model.embedding import check_some_are_new
from llava_lite.model.splice import Batch, expand_placeholders, placeholder_mask, positions_from_mask

logger = logging.getLogger(__name__)

# Tells `generate(images=None)`, LLaVA's way, from a call that never names `images`, the way of transformers.
UNSET = object()
# Ways of generating that look up the ids of the prompt themselves and would never see its embeddings, or that want no
# embeddings beside the ids; with the value that asks for nothing.
BY_IDS = {"assistant_model": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
BY_IDS |= {"prefill_chunk_size": None, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
BY_IDS |= {"guidance_scale": 1.0}


class PictureGeneration:
    """`generate` for ids in which placeholders stand for images."""

    @torch.no_grad()
    def generate(self, inputs=None, images=UNSET, image_sizes=None, pixel_values=None, image_features=None, **kwargs):
        """Generate from token ids [B, T] and images; two conventions, one result.

        Called LLaVA's way (`images=`, None included) it returns new tokens only; called the transformers way
        (`pixel_values=`, or text alone) the prompt comes first, its images expanded to one id a feature and a
        placeholder of -200 shown as the padding id. Rows may be padded on either side; they are padded left here.
        Without attention_mask the transformers way takes padding ids for padding, as transformers does. position_ids
        [B, L] other than the usual ones are for rows that need no change here.
        image_features: what the tower made of the images, in place of them (see `encode_pictures`).

        past_key_values: a cache to go on from. The ids are then all ids, those of the cached positions first, or the
        new ones alone with an attention_mask [B, K + T] that covers the cached positions too; the images are those of
        all ids or of the new ones. Raises ValueError where ids, mask and cache fit neither.

        A model in training mode is in evaluation mode meanwhile: call `eval()` before threads share it.
        """
        llava_way = images is not UNSET
        pictures = pixel_values if not llava_way or images is None else images
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            if pixel_values is not None:
                kwargs["inputs_embeds"] = self.write_pictures(kwargs["inputs_embeds"], pixel_values, image_sizes)
            return super().generate(inputs=input_ids, **kwargs)
        kwargs.pop("inputs_embeds", None)
        given_positions = kwargs.pop("position_ids", None)
        mask = kwargs.pop("attention_mask", None)
        if mask is None and not llava_way:
            mask = self.infer_mask(input_ids, kwargs)
        if mask is None and self.argument("is_assistant", kwargs):
            # For the drafts of assisted decoding transformers hands over all ids.
            mask = torch.ones_like(input_ids)
        if given_positions is not None and counts_as_usual(given_positions, input_ids, mask):
            given_positions = None
        with evaluating(self):
            ids, mask, embeds = self.embed_prompt(
                Batch(input_ids, mask), pictures, image_sizes, image_features, cached_len(kwargs), llava_way
            )
            if given_positions is not None:
                if ids is not input_ids or given_positions.shape[-1] != mask.shape[1]:
                    raise ValueError(
                        f"position_ids of {given_positions.shape[-1]} positions that do not count 0, 1, 2, ... for a "
                        f"prompt of {mask.shape[1]}: give rows that are padded on the left and have one placeholder a "
                        "feature, as the processor writes them, and a position for each; or leave position_ids out."
                    )
                kwargs["position_ids"] = given_positions
            sees = pictures is not None or image_features is not None
            ends_in_image = sees and bool(placeholder_mask(ids[:, -1:], self.config.image_token_index).any())
            ids = self.printable_ids(ids, None if ids is input_ids else mask, kwargs)
            kwargs["attention_mask"] = mask
            if embeds is None:
                # From ids, as adapters that put a prompt of their own before them want it.
                output = super().generate(input_ids=ids, **kwargs)
            elif asked := self.asked_by_ids(kwargs):
                if ids.shape[1] != mask.shape[1]:
                    raise ValueError(
                        f"{', '.join(asked)} looks up the ids of the prompt, but there are {ids.shape[1]} ids of "
                        f"{mask.shape[1]} positions; give all ids."
                    )
                if ends_in_image:
                    raise ValueError(
                        f"{', '.join(asked)} reads the end of the prompt by its id, and a prompt ends with an image. "
                        "Put text after the image, such as the beginning of the answer, or generate without it."
                    )
                kwargs["past_key_values"] = self.prefill(embeds, mask, kwargs)
                output = super().generate(input_ids=ids, **kwargs)
                return without_prompt(output, ids.shape[1]) if llava_way else output
            elif llava_way:
                output = super().generate(inputs_embeds=embeds, **kwargs)
            else:
                output = super().generate(inputs_embeds=embeds, input_ids=ids, **kwargs)
            return output

    def embed_prompt(self, batch: Batch, images, image_sizes, image_features, num_cached: int, llava_way: bool):
        """Return (ids, mask [B, L], embeddings [B, L, D]); of a call with a cache the ids may be the new ones alone.

        Mask and embeddings are those of all positions; of cached ones the embeddings are zeros, which nobody reads.
        They are None where no image is in the call: then transformers looks up the ids itself.
        """
        is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
        sees = images is not None or image_features is not None or bool(is_picture.any())
        is_text = not (sees or llava_way or self.needs_dummy())
        is_all = check_going_on(batch, num_cached) if num_cached else True
        if not num_cached:
            batch = pad_rows_left(batch)
        elif is_text and is_all:
            check_some_are_new(batch.input_ids.shape[1], num_cached)
        embeds = None
        if not is_text and num_cached and is_all:
            batch, embeds = self.embed_after_cache(batch, num_cached, images, image_sizes, image_features)
        elif not is_text:
            # A row that goes on from a cache stays where it is; the left is the cache's.
            pad_left = None if num_cached else True
            batch, embeds = self.embed_batch(batch, images, image_sizes, pad_left, image_features)
        mask = batch.attention_mask
        if embeds is not None and num_cached:
            embeds = torch.cat([embeds.new_zeros(len(embeds), num_cached, embeds.shape[2]), embeds], dim=1)
        if mask is None:
            mask = torch.ones_like(batch.input_ids) if embeds is None else torch.ones_like(embeds[..., 0]).long()
        return batch.input_ids, mask, embeds

    def infer_mask(self, input_ids: torch.Tensor, arguments: dict) -> torch.Tensor | None:
        """Return the mask [B, T] of ids without one: zeros at padding ids, unless these end an answer too.

        The rule of transformers, which it would apply to ids that have grown by then.
        """
        pad, ends = self.argument("pad_token_id", arguments), self.argument("eos_token_id", arguments)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is not None and pad not in ends:
            mask = (input_ids != pad).long()
            return None if bool(mask.all()) else mask
        if len(input_ids) > 1:
            logger.warning(
                "generate got %d rows and no attention_mask, and padding cannot be told from the ids: pad_token_id is "
                "%s, eos_token_id %s. Every id is taken for text; give the attention_mask of the processor.",
                *(len(input_ids), pad, ends),
            )
        return None

    def asked_by_ids(self, arguments: dict) -> list[str]:
        """Return which ways of generating are asked for that need the prompt in a cache and not as embeddings."""
        asked = {name: self.argument(name, arguments) for name in BY_IDS}
        return [name for name, value in asked.items() if value is not None and value != BY_IDS[name]]

    def argument(self, name: str, arguments: dict):
        """Return what `generate` was told, by name or in a generation config, None if nothing."""
        config = arguments.get("generation_config") or self.generation_config
        return arguments.get(name, getattr(config, name, None))

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor, arguments: dict):
        """Return a cache of all positions of the prompt [B, L, D] but the last, which the first step reads.

        arguments: of `generate`; prefill_chunk_size is taken out, since the prompt is read here, that many at a time,
        and cache_implementation, since the cache is made here.
        """
        chunk_len = self.argument("prefill_chunk_size", arguments)
        for name in ("prefill_chunk_size", "cache_implementation"):
            arguments.pop(name, None)
        cache = arguments.pop("past_key_values", None)
        cache = DynamicCache(config=self.config) if cache is None else cache
        positions, end = arguments.get("position_ids"), embeds.shape[1] - 1
        positions = positions_from_mask(mask) if positions is None else positions
        start = cache.get_seq_length()
        while start < end:
            stop = min(end, start + (chunk_len or end))
            self(
                inputs_embeds=embeds[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            start = stop
        # transformers repeats rows for beams and for several answers, and leaves a cache as it is.
        copies = max(self.argument(name, arguments) or 1 for name in ("num_beams", "num_return_sequences"))
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return cache

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """Return the inputs of the next step: of all ids [B, L] those that are not in the cache yet."""
        # Assisted decoding hands its first step all ids, whatever a cache holds. New ids alone are known by what
        # covers all positions: the mask or, where transformers has dropped one without zeros, the position ids.
        covering = kwargs.get("attention_mask")
        covering = kwargs.get("position_ids") if covering is None else covering
        if next_sequence_length is None and past_key_values is not None and covering is not None:
            num_cached = past_key_values.get_seq_length()
            if 0 < num_cached < input_ids.shape[1] == covering.shape[-1]:
                next_sequence_length = input_ids.shape[1] - num_cached
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            # transformers looks for this name in the signature.
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def printable_ids(self, input_ids: torch.Tensor, mask: torch.Tensor | None, arguments: dict) -> torch.Tensor:
        """Replace -200 by an id of the vocabulary: logits processors and `batch_decode` look ids up.

        mask: [B, L] of rows whose padding was written anew, which then is the padding id too; None for other rows.
        """
        ends = self.argument("eos_token_id", arguments)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        candidates = (self.argument("pad_token_id", arguments), self.config.pad_token_id, *ends, 0)
        token = next(int(one) for one in candidates if one is not None and one >= 0)
        is_hidden = input_ids < 0
        if mask is not None:
            is_hidden |= mask[:, -input_ids.shape[1] :] == 0
        return input_ids.masked_fill(is_hidden, token)


# Models in training mode that generate: how many calls there are, and the modules to put back.
_EVALUATING: WeakKeyDictionary = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def evaluating(model):
    """Keep a model in evaluation mode while any call is in the block; each module gets its own mode back."""
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
    """Return how many positions the cache holds that `generate` was given; 0 without one."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def counts_as_usual(positions: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Tell whether position_ids [B, T] count the real tokens of each row, as they are counted without any."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions.shape[-1] > mask.shape[1]:
        return False
    usual, real = (values[:, -positions.shape[-1] :] for values in (positions_from_mask(mask), mask.bool()))
    return bool((positions.to(usual.device) == usual)[real].all())


def check_going_on(batch: Batch, num_cached: int) -> bool:
    """Return whether the ids [B, T] of a call with a cache are all ids; False for the new ones alone.

    Raises ValueError if they are neither, by the length of the mask.
    """
    num_ids = batch.input_ids.shape[1]
    mask_len = num_ids if batch.attention_mask is None else batch.attention_mask.shape[1]
    if mask_len == num_ids:
        if batch.attention_mask is None and num_ids > num_cached:
            logger.warning(
                "generate got %d ids, a cache of %d positions and no attention_mask: taken for all ids, of which the "
                "last %d are new. If all are new, give an attention_mask of %d.",
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
    """Return what `generate` returned, ids [B, L + new] or an output that holds them, with new tokens only."""
    if isinstance(output, torch.Tensor):
        return output[:, prompt_len:]
    output.sequences = output.sequences[:, prompt_len:]
    return output


def pad_rows_left(batch: Batch) -> Batch:
    """Move each row's padding to its left; generation appends on the right."""
    if batch.attention_mask is None or bool(batch.attention_mask[:, -1].all()):
        return batch
    never = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    return expand_placeholders(batch, never, [], pad_left=True)
