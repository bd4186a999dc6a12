"""Merge a directory of trained weights (LoRA, connector) and its base into a complete model, and prove it equal.

`llava-lite merge SOURCE TARGET`, or LLaVA's `--model-path --model-base --save-model-path`. One copy of the model is in
memory, in float32.
"""

import gc
from contextlib import nullcontext
from pathlib import Path

import torch

from llava_lite.checkpoints.config import is_llava
from llava_lite.checkpoints.files import ADAPTER, ADAPTER_WEIGHTS, COMPLETE, TRAINED
from llava_lite.checkpoints.partial import merge_lora, open_adapter
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import (
    check_has_config,
    describe_step,
    get_step_adapter,
    holds_step,
    linked_directory,
    step_without_adapter,
    verify_model,
    verify_texts,
)
from llava_lite.export import verify
from llava_lite.export.merged_card import CARD, merged_card
from llava_lite.export.verified_directory import (
    TOLERANCE,
    check_empty,
    check_full_precision,
    finish_directory,
    get_our_answers,
    new_directory,
    push,
    sees,
)
from llava_lite.inference import load
from llava_lite.model.generation_config import savable_view


def merge(
    source, target, base=None, dtype=None, tolerance=TOLERANCE, max_shard_size="5GB", push_to_hub=None, report=print
):
    """Write the model of a directory of trained weights and its base to the directory `target`; return the Difference.

    base: None for the one that the source names. report: called with each line. Raises ValueError if the source is
    complete already, or if the written model answers differently; it is then left beside `target`.
    """
    source = str(source)
    Checkpoint(source).check()
    check_empty(target)
    directory = get_local_directory(source)
    verify_texts(directory)
    check_has_config(directory)
    checkpoint = Checkpoint(directory, base=base)
    check_not_complete(checkpoint)
    base = checkpoint.base.path
    check_full_precision(checkpoint)
    if holds_step(directory):
        report(f"{directory} holds {describe_step(directory)}")
    model, processor, is_adapter = open_unmerged(directory, base)
    dtype = getattr(torch, str(dtype).removeprefix("torch.")) if dtype is not None else model.dtype
    model = model.float().eval()
    batches = verify.readings(processor, sees(model))
    if is_adapter:
        tuned = with_adapter(model, directory).eval()
        apart = verify.answers(tuned, batches, processor.image_token_index)
        model = merge_lora(tuned).eval()
        check_merged(model, source)
        together = verify.answers(model, batches, processor.image_token_index)
        gap = verify.difference(apart, together)
        report(f"LoRA beside its base and merged: {gap.report()}")
        if not gap.passes(tolerance):
            raise ValueError(f"merging changed the answers ({gap.report()}; tolerance {tolerance:g}).")
    round_to(model, dtype)
    with new_directory(target) as unchecked:
        write_full(model, processor, unchecked, max_shard_size)
    # The rounding to the written dtype is part of what is expected.
    expected = verify.answers(model.float(), batches, processor.image_token_index)
    config = model.config
    del model
    gc.collect()
    gap = finish_directory(target, expected, get_our_answers(unchecked), tolerance, report)
    adapter = checkpoint.read_json(ADAPTER)
    card = merged_card(Path(target).name, source, directory, base, config, adapter, gap.report())
    (Path(target) / CARD).write_text(card, encoding="utf-8")
    push(target, push_to_hub, report)
    return gap


def check_merged(model, source) -> None:
    """Raise ValueError if a LoRA stays beside weights that prompts pass without it; see partial.merge_lora."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"{str(source)!r} has prompts that do not pass its LoRA of keys and values (adaption_prompt_lora false), "
            "which no single weight holds: it cannot be merged. It opens as it is."
        )


def get_local_directory(source) -> Path:
    """Return a directory as it is, of a hub id the local copy."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with Checkpoint(source).readable_errors():
        return Path(snapshot_download(source))


def check_not_complete(checkpoint):
    """Raise ValueError for a complete model, which has nothing to merge, and for weights that name no base."""
    is_complete = any(map(checkpoint.has, COMPLETE))
    if not is_complete and checkpoint.base is None:
        raise ValueError(
            f"{checkpoint.path!r} names no base model that its weights belong to. Give it: --model-base BASE."
        )
    if is_complete:
        raise ValueError(
            f"{checkpoint.path!r} holds a complete model already; there is nothing to merge. "
            "`llava-lite convert` writes it in transformers' own layout."
        )


def open_unmerged(directory, base):
    """Return (model, processor, whether an adapter is still to be put on it) of a directory and its base."""
    is_adapter = (directory / ADAPTER).is_file()
    if is_adapter and holds_step(directory):
        verify_model(directory)
        with step_without_adapter(directory) as rest:
            return *load(rest, device="cpu", dtype="auto", model_base=base), True
    if not is_adapter:
        return *load(directory, device="cpu", dtype="auto", model_base=base), False
    has_more = any((directory / name).is_file() for name in TRAINED)
    with linked_directory(directory, lambda name: name not in (ADAPTER, *ADAPTER_WEIGHTS)) as rest:
        opened = {"model_path": rest, "model_base": base} if has_more else {"model_path": base}
        model, processor = load(**opened, device="cpu", dtype="auto")
    return model, processor, True


def with_adapter(model, directory):
    """Return PEFT's model of a model and the LoRA of a directory beside it."""
    with get_step_adapter(directory) if holds_step(directory) else nullcontext(directory) as there:
        return open_adapter(model, Checkpoint(there))


def round_to(model, dtype) -> None:
    """Cast the weights and not the buffers: rotary frequencies in half precision would be others."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def write_full(model, processor, directory, max_shard_size):
    """Write every weight with tokenizer and processor."""
    if is_llava(model.config):
        model.config.base_model_name_or_path = None
        model.config.conv_template = processor.conv_template
    savable_view(model).save_pretrained(directory, max_shard_size=max_shard_size)
    processor.save_pretrained(directory)
