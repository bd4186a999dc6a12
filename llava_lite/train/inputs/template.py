"""How the records of a run become examples: its conversation template, and what its flags and its model choose."""

from dataclasses import replace


def get_run_template(model_args, data_args, moment):
    """Return the conversation template of a run with what its flags choose; moment: the date that it writes."""
    from llava_lite.conversation import get_template

    template = get_template(
        model_args.version,
        enable_thinking=bool(model_args.enable_thinking),
        chat_end_token=model_args.chat_end_token,
        special_tokens_in_text=data_args.special_tokens_in_text,
    )
    return replace(template, options=template.options._replace(moment=moment))


def example_settings(model, model_args, data_args, training_args, moment) -> dict:
    """Return the keywords of an ExampleMaker but its tokenizer: the same for annotation files and for shards.

    moment: the date that a chat template writes.
    """
    from llava_lite.media.layout import ImageLayout

    tower, config = model.get_vision_tower(), model.config
    return {
        "image_processor": None if tower is None else tower.image_processor,
        "conv_template": get_run_template(model_args, data_args, moment),
        "layout": ImageLayout(0) if tower is None else config.image_layout,
        "max_length": training_args.model_max_length,
        "mm_use_im_start_end": config.mm_use_im_start_end,
        "injection": config.mm_injection,
        "image_position": config.mm_image_position,
        "image_resize": data_args.image_resize,
        "placeholder_as_text": data_args.placeholder_as_text,
    }
