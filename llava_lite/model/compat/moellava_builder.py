"""Open a checkpoint as MoE-LLaVA does: a dict of processors, and a model that repeats the prompt before its answer.

`moellava.model.builder` is this module, so that MoE-LLaVA's notebooks, which read `processor["image"]` and slice the
prompt off, run unchanged. The rest of `moellava` is the same as under LLaVA's names.
"""

from types import MethodType

import torch

from llava_lite.model import builder


def load_pretrained_model(
    model_path,
    model_base=None,
    model_name=None,
    load_8bit=False,
    load_4bit=False,
    device_map="auto",
    device="cuda",
    padding_side="right",
    merge=False,
    **kwargs,
):
    """Return (tokenizer, model, {"image": image processor, "video": None}, context_len).

    padding_side: of the tokenizer. merge: accepted and not needed, a LoRA is always merged. The rest as in
    `llava_lite.model.builder`; no DeepSpeed is needed, and there is no engine around the model.
    """
    tokenizer, model, image_processor, context_len = builder.load_pretrained_model(
        model_path, model_base, model_name, load_8bit, load_4bit, device_map, device, **kwargs
    )
    tokenizer.padding_side = padding_side
    # On this model alone: MoE-LLaVA returns the prompt too, and its programs cut it off; other models do as LLaVA.
    model.generate = MethodType(generate_after_prompt, model)
    return tokenizer, model, {"image": image_processor, "video": None}, context_len


def generate_after_prompt(model, inputs=None, images=None, **kwargs):
    """Generate from token ids [B, T] and images; return the given ids, -200 included, followed by the new ones.

    In the convention of transformers (pixel_values=, or no images) this is the model's own `generate`.
    """
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    if images is None or input_ids is None:
        return type(model).generate(model, inputs, **kwargs)
    output = type(model).generate(model, inputs, images=images, **kwargs)
    tokens = output if isinstance(output, torch.Tensor) else output.sequences
    # Several answers to a question are adjacent rows.
    prompts = input_ids.to(tokens.device).repeat_interleave(len(tokens) // len(input_ids), dim=0)
    tokens = torch.cat([prompts, tokens], dim=1)
    if isinstance(output, torch.Tensor):
        return tokens
    output.sequences = tokens
    return output
