"""Collect and write parts of a model's weights under the names of LLaVA's `train.py`."""

import logging
import os

import torch
from torch import nn

from llava_lite.checkpoints.copying import gathered
from llava_lite.checkpoints.vocabulary import fit_rows
from llava_lite.train.saving.final import save_final
from llava_lite.train.saving.trained_weights import PROJECTOR
from llava_lite.train.tuning import get_part

logger = logging.getLogger(__name__)

OUTSIDE_DECODER = ("mm_projector", "vision_tower", "vision_resampler")


def maybe_zero_3(param, ignore_status=False, name=None):
    """Return a parameter's value on the CPU, gathered under ZeRO-3, where all ranks must call this.

    ignore_status, name: accepted and not needed.
    """
    with gathered([param]):
        return param.detach().to("cpu", copy=True)


def get_mm_adapter_state_maybe_zero_3(named_params, keys_to_match):
    """Return the weights whose names contain one of `keys_to_match`."""
    return {name: maybe_zero_3(param) for name, param in named_params if any(key in name for key in keys_to_match)}


def get_peft_state_maybe_zero_3(named_params, bias):
    """Return LoRA's weights and, with bias `all`, every bias, with `lora_only` those of the layers that have LoRA."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"unknown bias {bias!r}; known: none, all, lora_only.")
    named = dict(named_params)
    layers = {name.partition("lora_")[0] for name in named if "lora_" in name}

    def is_kept(name):
        if "lora_" in name:
            return True
        # PEFT keeps the layer itself, bias included, as `base_layer` beside its own weights.
        layer = name.removesuffix("bias").removesuffix("base_layer.")
        return bias != "none" and name.endswith("bias") and (bias == "all" or layer in layers)

    return {name: maybe_zero_3(param) for name, param in named.items() if is_kept(name)}


def get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only=True):
    """Return the weights that are none of LoRA's; by default those that train."""
    kept = {n: p for n, p in named_params if "lora_" not in n and (p.requires_grad or not require_grad_only)}
    return {name: maybe_zero_3(param) for name, param in kept.items()}


def find_all_linear_names(model):
    """Return the last names of the decoder's linear layers, sorted, without the vocabulary head: what gets LoRA.

    PEFT finds these names in a tower too, which LLaVA loads only afterwards. What keeps LoRA out of it, as our own
    `--lora_enable True` does: LoraConfig(exclude_modules=r".*vision_tower.*").
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in OUTSIDE_DECODER)
    ]
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})


def smart_tokenizer_and_embedding_resize(special_tokens_dict, tokenizer, model):
    """Add special tokens; the rows of new ones are the mean of the old ones. Vocabulary matrices never shrink."""
    num_known = min(len(tokenizer), model.config.vocab_size)
    tokenizer.add_special_tokens(special_tokens_dict)
    fit_rows(model, len(tokenizer), num_known)


def safe_save_model_for_hf_trainer(trainer, output_dir):
    """Write what a trainer has trained; all ranks must call this.

    Of a run that trains the connector alone: config.json and mm_projector.bin, or, for a directory `checkpoint-N`,
    `mm_projector/checkpoint-N.bin` beside it. Otherwise the full model, with its tokenizer.
    """
    model, args = trainer.model, trainer.args
    trained = {get_part(name) for name, param in model.named_parameters() if param.requires_grad}
    only_connector = getattr(args, "tune_mm_mlp_adapter", False) or trained == {"mm_projector"}
    if not only_connector:
        parts = [trainer.processing_class]
        save_final(model, output_dir, parts=parts, full=True, is_writer=args.should_save)
        return
    # Without the newline of LLaVA-1.6, which LLaVA leaves out, the directory could not be opened again.
    keys = ["mm_projector", "image_newline"] + ["embed_tokens"] * getattr(args, "use_im_start_end", False)
    weights = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), keys)
    if not args.should_save:
        return
    parent, directory = os.path.split(os.path.normpath(output_dir))
    path = os.path.join(output_dir, PROJECTOR)
    if directory.startswith("checkpoint-"):
        path = os.path.join(parent, "mm_projector", f"{directory}.bin")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    model.config.save_pretrained(output_dir)
    torch.save(weights, path)
    logger.info("the connector is in %s", path)
