"""Open a processor from the files of a checkpoint, ours or LLaVA's, and write them."""

import os

from transformers.utils import PROCESSOR_NAME

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import verify_texts
from llava_lite.checkpoints.tokenizer import (
    get_image_processor,
    get_template_name,
    load_tokenizer,
    open_image_processor,
)
from llava_lite.constants import IMAGE_TOKEN_INDEX, with_todays_keys
from llava_lite.conversation import get_template
from llava_lite.hub.errors import CONFIG

# What a processor saves of its own, beside its parts.
SETTINGS = ("conv_template", "image_aspect_ratio", "num_image_tokens", "image_token_index", "use_im_start_end")
SETTINGS += ("image_grid_pinpoints", "mm_patch_merge_type")
# Those that processors saved earlier do not have, and what is meant without them.
LATER_SETTINGS = {"mm_injection": "tokens", "mm_image_position": "placeholder"}
LATER_SETTINGS |= {"mm_boundary_vectors": False, "image_channels": "rgb"}
# Fields of PromptOptions that a checkpoint keeps.
PROMPT_SETTINGS = ("enable_thinking", "chat_end_token", "special_tokens_in_text")

# Keywords that the Auto classes and pipelines pass to processor and model alike, and no processor needs; those with an
# underscore are private to transformers.
OF_OTHERS = ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "code_revision", "config")
OF_OTHERS += ("dtype", "torch_dtype", "device_map", "attn_implementation", "low_cpu_mem_usage", "use_fast", "backend")


class ProcessorFiles:
    """`from_config`, `from_pretrained` and `save_pretrained` of the processor."""

    @classmethod
    def from_config(cls, config, tokenizer, image_processor=None):
        """Build the processor that a model's config asks for, from parts that are already loaded."""
        sees = image_processor is not None and getattr(config, "has_vision_tower", False)
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            conv_template=get_template_name(config, tokenizer),
            image_aspect_ratio=getattr(config, "image_aspect_ratio", "square"),
            num_image_tokens=config.num_image_tokens if sees else 0,
            image_token_index=getattr(config, "image_token_index", IMAGE_TOKEN_INDEX),
            use_im_start_end=getattr(config, "mm_use_im_start_end", False),
            chat_template=getattr(tokenizer, "chat_template", None),
            image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
            mm_patch_merge_type=getattr(config, "mm_patch_merge_type", "flat"),
            **{key: getattr(config, key) for key in (*PROMPT_SETTINGS, *LATER_SETTINGS) if hasattr(config, key)},
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a directory or hub id: one that `save_pretrained` wrote, or one of LLaVA's without a processor.

        LLaVA's directories hold config.json and the tokenizer; the image processor is then that of `mm_vision_tower`.
        A processor that was saved without its model needs no config.json. A directory without a tokenizer (projector,
        LoRA) takes that of `base_model_name_or_path`. Further keywords replace what was saved, of the processor
        (conv_template="llava_v1") or of a part of it (padding_side="right", do_center_crop=False); those of the
        hub (revision, token, ...) go to every file.
        """
        checkpoint = Checkpoint.open(pretrained_model_name_or_path, kwargs)
        verify_texts(checkpoint.path)
        kwargs = {key: value for key, value in kwargs.items() if key not in OF_OTHERS}
        saved = with_todays_keys(checkpoint.read_json(PROCESSOR_NAME))
        if saved.keys() >= set(SETTINGS) and not checkpoint.has(CONFIG):
            # Saved or pushed without its model: processor_config.json holds all settings.
            tokenizer = load_tokenizer(checkpoint)
            image_processor = open_image_processor(checkpoint) if saved.get("image_processor") else None
            processor = cls(image_processor, tokenizer, chat_template=getattr(tokenizer, "chat_template", None))
        else:
            config = checkpoint.config
            processor = cls.from_config(config, load_tokenizer(checkpoint), get_image_processor(checkpoint, config))
        for key in (*SETTINGS, *PROMPT_SETTINGS, *LATER_SETTINGS):
            setattr(processor, key, kwargs.pop(key, saved.get(key, getattr(processor, key))))
        for key, value in kwargs.items():
            part = next(
                (part for part in (processor, processor.tokenizer, processor.image_processor) if hasattr(part, key)),
                None,
            )
            if part is None:
                raise TypeError(f"unknown keyword {key!r}: neither processor, tokenizer nor image processor has it.")
            setattr(part, key, value)
        get_template(processor.conv_template)
        return processor

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write the tokenizer and processor_config.json, which holds the image processor too."""
        if self.image_processor is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # The parent takes every part for present.
        self.tokenizer.save_pretrained(save_directory)
        self.to_json_file(os.path.join(save_directory, PROCESSOR_NAME))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)
        return [os.path.join(save_directory, PROCESSOR_NAME)]
