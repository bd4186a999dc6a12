"""Turn token ids and pictures into new tokens: encode once, splice, and leave the rest to transformers.

B rows, T tokens before the splice, L after, D model width.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from llava_lite.model.kv_cache import GrowingCache, give_room
from llava_lite.model.splice import Batch, expand_placeholders, placeholder_mask, positions_from_mask

# Tells `generate(images=None)`, LLaVA's way, from a call that never says `images`, the way of transformers.
UNSET = object()
# Ways of generating that look up the ids of the prompt themselves and would never see its embeddings, or that want no
# embeddings beside the ids; with the value that asks for nothing.
BY_IDS = {"assistant_model": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
BY_IDS |= {"prefill_chunk_size": None, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
BY_IDS |= {"guidance_scale": 1.0}
# What a call must ask for, if anything, that a compiled step in a cache of fixed size shall serve.
FIXED_SIZE_SERVES = {"cache_implementation": None, "past_key_values": None, "use_cache": True, "num_beams": 1}
FIXED_SIZE_SERVES |= {"num_return_sequences": 1, "disable_compile": False, "return_dict_in_generate": False}
# Compiling takes as long as hundreds of plain steps, so a model that has made few steps, or is asked for few, is not
# compiled; chosen, not measured.
STEPS_BEFORE_COMPILING, LEAST_NEW_TOKENS = 1024, 32
# Lengths of a fixed cache are multiples of this, so that another prompt need not compile anew.
FIXED_SIZE_STEP = 1024


class PictureGeneration:
    """`generate` for ids in which placeholders stand for pictures."""

    # Steps that `generate` has made on CUDA.
    steps_made = 0

    @torch.no_grad()
    def generate(self, inputs=None, images=UNSET, image_sizes=None, pixel_values=None, **kwargs):
        """Generate from token ids [B, T] and pictures; two conventions, one result.

        Called LLaVA's way (`images=`, None included) it returns new tokens only; called the transformers way
        (`pixel_values=`, or text alone) the prompt comes first, its pictures expanded to one id a feature and a
        placeholder of -200 shown as the padding id. Rows may be padded on either side; they are padded left here.
        """
        llava_way = images is not UNSET
        pictures = pixel_values if not llava_way or images is None else images
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            if pixel_values is not None:
                kwargs["inputs_embeds"] = self.write_pictures(kwargs["inputs_embeds"], pixel_values, image_sizes)
            return super().generate(inputs=input_ids, **kwargs)
        kwargs.pop("inputs_embeds", None)
        batch = Batch(input_ids, kwargs.pop("attention_mask", None))
        kwargs.pop("position_ids", None)
        # Each module's own: a caller may keep parts of a model in training, or out of it.
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            batch = pad_rows_left(batch)
            is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
            is_text = not (llava_way or self.needs_dummy() or bool(is_picture.any())) and pictures is None
            if not is_text:
                batch, embeds = self.embed_batch(batch, pictures, image_sizes, pad_left=True)
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            kwargs["attention_mask"] = mask
            ids = self.printable_ids(batch.input_ids)
            if is_text:
                # Stock generation from ids, as adapters that put a prompt of their own before them want it.
                given = {"input_ids": ids}
            elif self.reads_ids(kwargs):
                kwargs["past_key_values"] = self.prefill(embeds, mask, kwargs)
                output = super().generate(input_ids=ids, **kwargs)
                return without_prompt(output, ids.shape[1]) if llava_way else output
            else:
                given = {"inputs_embeds": embeds} if llava_way else {"inputs_embeds": embeds, "input_ids": ids}
            with self.fixed_size(ids.shape[1], kwargs) as more:
                output = super().generate(**given, **kwargs, **more)
            self.count_steps(output, 0 if llava_way else ids.shape[1])
            return output
        finally:
            for module, training in modes:
                module.training = training

    def reads_ids(self, arguments: dict) -> bool:
        """Tell whether the way of generating that was asked for needs the prompt in a cache and not as embeddings."""
        asked = {name: self.argument(name, arguments) for name in BY_IDS}
        return any(value is not None and value != BY_IDS[name] for name, value in asked.items())

    def argument(self, name: str, arguments: dict):
        """Return what `generate` was told, by name or in a generation config, None if nothing."""
        config = arguments.get("generation_config") or self.generation_config
        return arguments.get(name, getattr(config, name, None))

    @contextmanager
    def fixed_size(self, prompt_len: int, arguments: dict):
        """Yield keywords for transformers' own static cache and compiled step where they pay, none elsewhere.

        On CUDA alone, for a model without experts that goes on generating; a caller who names a cache, or
        disable_compile, has chosen himself. prompt_len: positions of the prompt. Attention is sdpa meanwhile: our
        varlen reads a mask that grows, and would be compiled at every step.
        """
        if not self.wants_fixed_size(arguments):
            yield {}
            return
        length = prompt_len + self.argument("max_new_tokens", arguments)
        length = -(-length // FIXED_SIZE_STEP) * FIXED_SIZE_STEP
        attention = self.config._attn_implementation
        self.config._attn_implementation = "sdpa"
        try:
            yield {"cache_implementation": "static", "max_cache_len": length}
        finally:
            self.config._attn_implementation = attention

    def wants_fixed_size(self, arguments: dict) -> bool:
        """Tell whether a call on CUDA is worth a compiled step."""
        return (
            self.device.type == "cuda"
            and self.steps_made >= STEPS_BEFORE_COMPILING
            and (self.argument("max_new_tokens", arguments) or 0) >= LEAST_NEW_TOKENS
            and self.config._attn_implementation in ("sdpa", "varlen")
            and not self.moe_layers()
            and all(self.argument(name, arguments) in (None, usual) for name, usual in FIXED_SIZE_SERVES.items())
        )

    def count_steps(self, output, prompt_len: int) -> None:
        """Add the steps of a call on CUDA that returned ids [B, prompt_len + new], or an output that holds them."""
        if self.device.type == "cuda":
            ids = output if isinstance(output, torch.Tensor) else output.sequences
            self.steps_made += ids.shape[1] - prompt_len

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor, arguments: dict):
        """Return a cache of all positions of the prompt [B, L, D] but the last, which the first step reads.

        arguments: of `generate`; prefill_chunk_size is taken out, since the prompt is read here, that many at a time,
        and cache_implementation, since the cache is made here.
        """
        chunk_len = self.argument("prefill_chunk_size", arguments)
        for name in ("prefill_chunk_size", "cache_implementation"):
            arguments.pop(name, None)
        cache = arguments.pop("past_key_values", None)
        cache = GrowingCache(self.config) if cache is None else cache
        positions, end = positions_from_mask(mask), embeds.shape[1] - 1
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

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give the cache that transformers makes room to grow, unless the caller named one."""
        named = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not named:
            give_room(model_kwargs.get("past_key_values"))

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """Return the inputs of the next step: of the ids [B, L] those that are not in the cache yet."""
        # Assisted decoding hands its first step all ids, whatever a cache holds.
        if next_sequence_length is None and kwargs.get("use_cache") and past_key_values is not None:
            cached_len = past_key_values.get_seq_length()
            if 0 < cached_len < input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - cached_len
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            # transformers looks for this name in the signature.
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def printable_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace -200 by an id of the vocabulary: logits processors and `batch_decode` look ids up."""
        ends = self.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        for token in (self.generation_config.pad_token_id, self.config.pad_token_id, *ends, 0):
            if token is not None and token >= 0:
                return input_ids.masked_fill(input_ids < 0, token)
        return input_ids


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
