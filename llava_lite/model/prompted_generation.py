"""`generate` with images in the attention, mm_injection adaption_prompt: the text stays as it is."""

from __future__ import annotations

import torch

from llava_lite.model.cached_images import check_images_again, check_same_images, image_mask, note_images, row_indices
from llava_lite.model.fusion.splice import Batch
from llava_lite.model.generate_calls import (
    GenerateCalls,
    cached_len,
    counts_as_usual,
    evaluating,
    pad_rows_left,
    without_prompt,
)

# Those that let another model, or a part of this one, write drafts.
DRAFTS = ("assistant_model", "assistant_early_exit")


class PromptedGeneration(GenerateCalls):
    """`generate_with_prompts`, for a class whose `generate` calls it."""

    def generate_with_prompts(self, input_ids, images, image_features, image_rows, is_llava_call: bool, kwargs: dict):
        """Generate with images in the attention, mm_injection adaption_prompt; arguments as in `generate`."""
        drafting = [name for name in DRAFTS if self.argument(name, kwargs) is not None]
        if drafting:
            raise ValueError(
                f"{', '.join(drafting)}: a draft model is given no prompts of mm_injection adaption_prompt. Leave it "
                "out, or draft from the text itself: prompt_lookup_num_tokens."
            )
        embeds = kwargs.get("inputs_embeds")
        given, kwargs["input_ids"] = (input_ids, input_ids) if embeds is None else (embeds, input_ids)
        if embeds is None:
            mask = kwargs.pop("attention_mask", None)
            if mask is None and not is_llava_call:
                mask = self.infer_mask(input_ids, kwargs)
            batch = Batch(input_ids, mask)
            batch = batch if cached_len(kwargs) else pad_rows_left(batch)
            positions = kwargs.get("position_ids")
            if positions is not None and counts_as_usual(positions, input_ids, mask):
                # generate counts them itself.
                kwargs.pop("position_ids")
            elif positions is not None and batch.input_ids is not input_ids:
                raise ValueError(
                    "position_ids that do not count 0, 1, 2, ... for sequences that are padded on the right: pad them "
                    "on the left, or leave position_ids out."
                )
            self.embed_text(batch.input_ids)
            kwargs["input_ids"] = batch.input_ids
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            kwargs["attention_mask"] = mask
        cache, visual = kwargs.get("past_key_values"), kwargs.pop("visual_prompts", None)
        rows, has_image = row_indices(image_rows), (True,) * len(given)
        with evaluating(self):
            if visual is None:
                # Once a call: every step has its own keys and values of them.
                visual = self.visual_prompts(len(given), images, image_features, rows)
                has_image = image_mask(len(given), images if image_features is None else image_features, rows)
                check_images_again(cache, has_image)
            check_same_images(cache, visual)
            output = super().generate(visual_prompts=visual, **kwargs)
        # The forward pass took the prompts for images, also those of mm_text_only blank.
        for used in (cache, getattr(output, "past_key_values", None)):
            note_images(used, has_image, visual)
        returns_prompt = is_llava_call and embeds is None
        return without_prompt(output, kwargs["input_ids"].shape[1]) if returns_prompt else output
