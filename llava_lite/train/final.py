"""Turn a trained model into the folder a stage leaves: the whole model, or what was trained and its base's name."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_lite.model.generation_config import write_generation_config
from llava_lite.model.new_words import grown_layers, is_row_name, with_new_rows
from llava_lite.model.weights import gathered
from llava_lite.train import manifest as paper
from llava_lite.train.expert_parallel import with_all_experts
from llava_lite.train.ranks import raise_together
from llava_lite.train.trained_weights import PROJECTOR, TRAINED, projector_state, trained_state

logger = logging.getLogger(__name__)

STAGED = f"{paper.STAGING_PREFIX}final"
# What an earlier run may have left in the folder and this one would not overwrite.
STALE = ("model*.safetensors*", "pytorch_model*", "adapter_*", "non_lora_trainables.bin")
# PEFT's wrapping, and its names for a weight that it has split in two.
PEFT_PREFIX, PEFT_BASE = "base_model.model.", ".base_layer."


def save_final(
    model,
    output_dir: str | Path,
    *,
    parts: Iterable = (),
    base: str | None = None,
    whole: bool = False,
    conv_template: str | None = None,
    card: str | None = None,
    is_writer: bool = True,
) -> None:
    """Write the final folder of a stage; all ranks must call it, those with `is_writer` write.

    model: the model in training, PEFT's wrapping included, the engine's not. parts: what has a `save_pretrained` of
    its own (tokenizer, image processor, processor). base: path or hub id of what the stage started from; needed unless
    `whole`. whole: write every weight (LoRA folded in), else trained.safetensors and, of a PEFT model, the adapter.
    conv_template: name of the prompt format that trained it. card: text of README.md. Raises SaveError on every rank,
    with the bytes needed and present, if one cannot write; an earlier folder is then as it was.
    """
    if whole and is_quantised(model):
        logger.warning("4 or 8 bit weights cannot be folded without loss: only what was trained is written.")
        whole = False
    if not whole and base is None:
        raise ValueError("a folder with only what was trained must name its base; give base= or whole=True.")
    output_dir = Path(output_dir)
    staged = output_dir / STAGED
    weights = whole_state(model, is_writer) if whole else trained_state(model, is_writer, buffers=False)
    projector = projector_state(model, keep=is_writer)
    error = None
    try:
        if is_writer:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            paper.check_room(output_dir, num_bytes(weights) + num_bytes(projector))
            write_folder(model, staged, weights, projector, None if whole else base, conv_template)
            for part in parts:
                if part is not None:
                    part.save_pretrained(staged)
            if card is not None:
                (staged / "README.md").write_text(card, encoding="utf-8")
            take_place(staged, output_dir)
    except Exception as problem:
        error = problem
        shutil.rmtree(staged, ignore_errors=True)
    advice = f"Could not write the model to {output_dir}; the last checkpoint-N holds its state."
    raise_together(error, paper.SaveError, advice)


def is_quantised(model) -> bool:
    """Tell whether bitsandbytes holds the frozen weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_peft(model) -> bool:
    """Tell whether PEFT wraps the model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def unwrapped(model):
    """Return the LLaVA model inside PEFT's wrapping."""
    return model.get_base_model() if is_peft(model) else model


def num_bytes(weights: dict[str, torch.Tensor]) -> int:
    """Return the bytes of the tensors, one with two names counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in weights.values()}.values())


def whole_state(model, keep: bool) -> dict[str, torch.Tensor]:
    """Return every weight under the plain model's names, LoRA and new words folded in.

    Under ZeRO-3 all ranks must call this. Tied names share one tensor. Ranks without `keep` take part in the gathering
    and get {}.
    """
    updates = {f"{name}.base_layer.weight": module for name, module in lora_modules(model)}
    grown, state, copies = grown_layers(model), {}, {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or is_row_name(name):
            continue
        lora, own = updates.get(name), grown.get(name)
        rows = [] if own is None else [own.new_rows]
        with torch.no_grad(), gathered([weight, *rows, *(lora.parameters() if lora is not None else ())]):
            if keep and id(weight) not in copies:
                value = weight.detach() if lora is None else folded(weight, lora)
                value = value if own is None else with_new_rows(value, own)
                copies[id(weight)] = value.to("cpu", copy=True)
        if keep:
            state[plain_name(name)] = copies[id(weight)]
    return with_all_experts(model, state, keep)


def lora_modules(model) -> Iterable[tuple[str, torch.nn.Module]]:
    """Return the modules to which PEFT added LoRA, by name."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")]


def folded(weight: torch.Tensor, module) -> torch.Tensor:
    """Return the base weight plus the module's low-rank update."""
    update = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
    return weight.detach() + update.to(weight.dtype)


def plain_name(name: str) -> str:
    """Return a weight's name in the model without PEFT."""
    return name.removeprefix(PEFT_PREFIX).replace(PEFT_BASE, ".")


def write_folder(model, folder: Path, weights, projector, base: str | None, conv_template: str | None) -> None:
    """Write config and weights; with a `base` the weights are a part of the model."""
    if projector:
        torch.save(projector, folder / PROJECTOR)
    inner = unwrapped(model)
    if base is None:
        own_config, inner.config = inner.config, settled_config(inner, None, conv_template)
        try:
            inner.save_pretrained(folder, state_dict=weights)
        finally:
            inner.config = own_config
        return
    write_config(inner, folder, base, conv_template)
    others = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    save_file({plain_name(name): weight for name, weight in others.items()}, folder / TRAINED, {"format": "pt"})
    if is_peft(model):
        adapter = {name: weight for name, weight in weights.items() if name not in others}
        # "auto" would open the base's config as one of ours, with a warning, to see whether the vocabulary has grown;
        # trained embeddings are among the others.
        model.save_pretrained(folder, state_dict=adapter, save_embedding_layers=False)
        # LLaVA's own loader looks for this file and these names.
        torch.save(others, folder / "non_lora_trainables.bin")


def settled_config(inner, base: str | None, conv_template: str | None):
    """Return the config of a model that is written, on its base if there is one."""
    config = copy.deepcopy(inner.config)
    config.conv_template = conv_template or config.conv_template
    config.base_model_name_or_path = base and findable(base)
    config.use_cache = True
    return config


def write_config(inner, folder: Path, base: str, conv_template: str | None = None, dtype=None) -> None:
    """Write what says of which model a part of the weights is: its config, its base, how it generates.

    dtype: that of the weights once they are opened; None for that of the model.
    """
    config = settled_config(inner, base, conv_template)
    # How the base was held meanwhile; its own config.json says how it is stored.
    vars(config).pop("quantization_config", None)
    # The tower is looked up again when the folder is opened, from wherever that is.
    config.mm_vision_tower = config.mm_vision_tower and findable(config.mm_vision_tower)
    config.architectures, config.dtype = [type(inner).__name__], inner.dtype if dtype is None else dtype
    config.save_pretrained(folder)
    write_generation_config(inner.generation_config, folder)


def findable(name: str) -> str:
    """Return the full path of a folder that exists here, and a hub id as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def take_place(staged: Path, output_dir: Path) -> None:
    """Move the written files to their place; config.json goes first and comes last, so half a folder is no model."""
    names = paper.files_of(staged)
    paper.as_readable_as(staged, names, staged / "config.json")
    paper.fsync_tree(staged, names)
    (output_dir / "config.json").unlink(missing_ok=True)
    for pattern in (*STALE, TRAINED):
        for path in output_dir.glob(pattern):
            path.unlink()
    for name in sorted(names, key=lambda name: name == "config.json"):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, output_dir / name)
    paper.fsync(output_dir)
    shutil.rmtree(staged)
