"""Turn token ids and images into new tokens: encode and write the images once, and let transformers generate.

A call leaves nothing on the model: threads may generate with one model at the same time. B sequences, T tokens before
images are expanded, L after, K cached positions, D model width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from llava_lite.model.cached_features import note_features
from llava_lite.model.fusion.encode import check_some_are_new
from llava_lite.model.fusion.splice import Batch, placeholder_mask, positions_from_mask
from llava_lite.model.generate_calls import (
    cached_len,
    check_continues,
    counts_as_usual,
    evaluating,
    pad_rows_left,
    without_prompt,
)
from llava_lite.model.prompted_generation import PromptedGeneration

# Distinguishes `generate(images=None)`, LLaVA's convention, from a call without `images`, that of transformers.
UNSET = object()


class ImageGeneration(PromptedGeneration):
    """`generate` for ids in which placeholders stand for images."""

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        images=UNSET,
        image_sizes=None,
        pixel_values=None,
        image_features=None,
        image_rows=None,
        **kwargs,
    ):
        """Generate from token ids [B, T] and images; two conventions, one result.

        LLaVA's convention (`images=`, None included) returns new tokens only. That of transformers (`pixel_values=`,
        or text alone) returns the prompt first, its images expanded to one id a feature, a placeholder of -200
        written as the padding id. Sequences may be padded on either side; they are padded on the left here. Without
        attention_mask, padding ids count as padding in the convention of transformers. position_ids [B, L] that do not
        count from 0 are for sequences that need no change here.
        image_features: the tower's features in place of the images (see `encode_each_image`).
        image_rows: the sequence of each image, with mm_injection adaption_prompt; or a mask [B] of those with one.

        past_key_values: a cache to continue. The ids are then all ids, those of the cached positions first, or the
        new ones alone with an attention_mask [B, K + T] that covers the cached positions too; the images are those of
        all ids or of the new ones. Raises ValueError where ids, mask and cache fit neither. With mm_injection
        adaption_prompt no position holds an image: the images are those of before, given again.

        A model in training mode is in evaluation mode during the call: call `eval()` before threads share it.
        """
        is_llava_call = images is not UNSET
        pixels = pixel_values if not is_llava_call or images is None else images
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if self.config.has_prompts:
            return self.generate_with_prompts(input_ids, pixels, image_features, image_rows, is_llava_call, kwargs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            if pixel_values is not None:
                kwargs["inputs_embeds"] = self.write_images(kwargs["inputs_embeds"], pixel_values, image_sizes)
            return super().generate(inputs=input_ids, **kwargs)
        kwargs.pop("inputs_embeds", None)
        given_positions = kwargs.pop("position_ids", None)
        mask = kwargs.pop("attention_mask", None)
        if mask is None and not is_llava_call:
            mask = self.infer_mask(input_ids, kwargs)
        if mask is None and self.argument("is_assistant", kwargs):
            # For the drafts of assisted decoding transformers passes all ids.
            mask = torch.ones_like(input_ids)
        if given_positions is not None and counts_as_usual(given_positions, input_ids, mask):
            given_positions = None
        by_ids = []
        given_cache, num_cached = kwargs.get("past_key_values"), cached_len(kwargs)
        with evaluating(self):
            ids, mask, embeds = self.embed_prompt(
                Batch(input_ids, mask), pixels, image_sizes, image_features, given_cache, num_cached, is_llava_call
            )
            if given_positions is not None:
                if ids is not input_ids or given_positions.shape[-1] != mask.shape[1]:
                    raise ValueError(
                        f"position_ids of {given_positions.shape[-1]} positions that do not count 0, 1, 2, ... for a "
                        f"prompt of {mask.shape[1]}: give sequences padded on the left with one placeholder a "
                        "feature, as the processor writes them, and a position for each; or leave position_ids out."
                    )
                kwargs["position_ids"] = given_positions
            has_images = pixels is not None or image_features is not None
            is_image = placeholder_mask(ids, self.config.image_token_index)
            is_image = F.pad(is_image, (mask.shape[1] - ids.shape[1], 0)) & has_images  # [B, L]
            ends_in_image = bool(is_image[:, -1].any())
            ids = self.printable_ids(ids, None if ids is input_ids else mask, kwargs)
            kwargs["attention_mask"] = mask
            if embeds is None:
                # From ids, which adapters with a prompt of their own need.
                output = super().generate(input_ids=ids, **kwargs)
            elif by_ids := self.find_id_options(kwargs):
                if ids.shape[1] != mask.shape[1]:
                    raise ValueError(
                        f"{', '.join(by_ids)} looks up the ids of the prompt, but there are {ids.shape[1]} ids of "
                        f"{mask.shape[1]} positions; give all ids."
                    )
                if ends_in_image:
                    raise ValueError(
                        f"{', '.join(by_ids)} reads the end of the prompt by its id, and a prompt ends with an "
                        "image. Put text after the image, such as the beginning of the answer, or generate without it."
                    )
                kwargs["past_key_values"] = self.prefill(embeds, mask, kwargs)
                output = super().generate(input_ids=ids, **kwargs)
            elif is_llava_call:
                output = super().generate(inputs_embeds=embeds, **kwargs)
            else:
                output = super().generate(inputs_embeds=embeds, input_ids=ids, **kwargs)
        if embeds is not None and has_images:
            for cache in (given_cache, getattr(output, "past_key_values", None)):
                note_features(cache, is_image, embeds, num_cached)
        # From embeddings alone transformers returns the new tokens.
        return without_prompt(output, ids.shape[1]) if is_llava_call and by_ids else output

    def embed_prompt(
        self, batch: Batch, images, image_sizes, image_features, cache, num_cached: int, is_llava_call: bool
    ):
        """Return (ids, mask [B, L], embeddings [B, L, D]); of a call with a cache the ids may be the new ones alone.

        Mask and embeddings cover all positions; cached ones have zeros as embeddings, which nothing reads. The
        embeddings are None in a call without images: then transformers looks up the ids itself.
        """
        is_image = placeholder_mask(batch.input_ids, self.config.image_token_index)
        has_images = images is not None or image_features is not None or bool(is_image.any())
        is_text = not (has_images or is_llava_call or self.needs_dummy())
        is_all = check_continues(batch, num_cached) if num_cached else True
        if not num_cached:
            batch = pad_rows_left(batch)
        elif is_text and is_all:
            check_some_are_new(batch.input_ids.shape[1], num_cached)
        embeds = None
        if not is_text and num_cached and is_all:
            batch, embeds = self.embed_after_cache(batch, cache, num_cached, images, image_sizes, image_features)
        elif not is_text:
            # A sequence that continues a cache keeps its padding side; on its left is the cache.
            pad_left = None if num_cached else True
            batch, embeds = self.embed_batch(batch, images, image_sizes, pad_left, image_features)
        mask = batch.attention_mask
        if embeds is not None and num_cached:
            embeds = torch.cat([embeds.new_zeros(len(embeds), num_cached, embeds.shape[2]), embeds], dim=1)
        if mask is None:
            mask = torch.ones_like(batch.input_ids) if embeds is None else torch.ones_like(embeds[..., 0]).long()
        return batch.input_ids, mask, embeds

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor, arguments: dict):
        """Return a cache of all positions of the prompt [B, L, D] but the last, which the first decode step reads.

        arguments: of `generate`; prefill_chunk_size and cache_implementation are removed from them, since the prefill
        and its cache are made here.
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
        # transformers repeats sequences for beams and for several answers, but not a given cache.
        copies = max(self.argument(name, arguments) or 1 for name in ("num_beams", "num_return_sequences"))
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return cache

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """Return the inputs of the next step: those of all ids [B, L] that are not in the cache yet."""
        # Assisted decoding passes all ids to its first step, with any cache. That the ids are all ids shows in the
        # length of the mask or, where transformers has dropped a mask without zeros, of the position ids.
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

        mask: [B, L] of sequences that were padded again, whose padding becomes the padding id too; None for others.
        """
        ends = self.argument("eos_token_id", arguments)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        candidates = (self.argument("pad_token_id", arguments), self.config.pad_token_id, *ends, 0)
        token = next(int(one) for one in candidates if one is not None and one >= 0)
        is_hidden = input_ids < 0
        if mask is not None:
            is_hidden |= mask[:, -input_ids.shape[1] :] == 0
        return input_ids.masked_fill(is_hidden, token)
