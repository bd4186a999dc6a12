"""Turn a folder of what was trained (LoRA, connector) and its base into a whole model, and prove it equal.

`llava-lite merge SOURCE TARGET`, or LLaVA's `--model-path --model-base --save-model-path`. One copy of the model is in
memory, in float32.
"""

import gc
import os
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from llava_lite.commands.merge import build_parser
from llava_lite.companions import find_base, read_json
from llava_lite.export import witness
from llava_lite.export.checked_folder import (
    TOLERANCE,
    check_full_precision,
    finish_folder,
    push,
    refuse_full,
    removed_on_error,
    start_folder,
)
from llava_lite.export.merged_card import CARD, merged_card
from llava_lite.hub import in_words
from llava_lite.inference import load
from llava_lite.model.builder import is_llava
from llava_lite.model.checkpoint_weights import (
    adapter_of_step,
    holds_step,
    refuse_nameless,
    step_in_words,
    step_without_adapter,
)
from llava_lite.model.generation_config import savable_view
from llava_lite.model.partial import ADAPTER, ADAPTER_WEIGHTS, TRAINED, WHOLE, base_of, open_adapter
from llava_lite.model_source import check_source


def merge(
    source, target, base=None, dtype=None, tolerance=TOLERANCE, max_shard_size="5GB", push_to_hub=None, say=print
):
    """Write what a folder of trained weights and its base are together to the folder `target`; return the Difference.

    base: None for the one that the source names. say: takes each line of the report. Raises ValueError if the source
    is whole already, or if what was written answers otherwise; it is then left beside `target`.
    """
    source = str(source)
    check_source(source)
    refuse_full(target)
    folder = local_folder(source)
    refuse_nameless(folder)
    base = find_base_of(folder, base)
    check_full_precision(folder, base)
    if holds_step(folder):
        say(f"{folder} holds {step_in_words(folder)}")
    model, processor, is_adapter = open_unfolded(folder, base)
    dtype = getattr(torch, str(dtype).removeprefix("torch.")) if dtype is not None else model.dtype
    model = model.float().eval()
    batches = witness.readings(processor, sees(model))
    if is_adapter:
        tuned = with_adapter(model, folder).eval()
        apart = witness.answers(tuned, batches, processor.image_token_index)
        model = tuned.merge_and_unload().eval()
        together = witness.answers(model, batches, processor.image_token_index)
        gap = witness.difference(apart, together)
        say(f"LoRA beside its base and folded in: {gap.report()}")
        if not gap.passes(tolerance):
            raise ValueError(f"folding changed the answers ({gap.report()}; tolerance {tolerance:g}).")
    unchecked = start_folder(target)
    round_to(model, dtype)
    with removed_on_error(unchecked):
        write_whole(model, processor, unchecked, max_shard_size)
    # The rounding to the written dtype is part of what is expected.
    expected = witness.answers(model.float(), batches, processor.image_token_index)
    config = model.config
    del model
    gc.collect()
    gap = finish_folder(target, expected, answers_of(unchecked), tolerance, say)
    adapter = read_json(folder, ADAPTER, {})
    card = merged_card(Path(target).name, source, folder, base, config, adapter, gap.report())
    (Path(target) / CARD).write_text(card, encoding="utf-8")
    if push_to_hub is not None:
        say(push(target, push_to_hub))
    return gap


def local_folder(source) -> Path:
    """Return a folder as it is, a hub id as its local copy."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with in_words(source):
        return Path(snapshot_download(source))


def find_base_of(folder, base):
    """Return the base to fold into; ValueError for a whole model, which has nothing to fold."""
    is_whole = any((folder / name).is_file() for name in WHOLE)
    named = (
        None
        if is_whole
        else base_of(folder, base or read_json(folder, "config.json", {}).get("base_model_name_or_path"), {})
    )
    if named is None:
        raise ValueError(
            f"{str(folder)!r} holds a whole model already; there is nothing to merge. "
            "`llava-lite convert` writes it in transformers' own layout."
        )
    return find_base(str(named), folder)


def open_unfolded(folder, base):
    """Return (model, processor, whether an adapter is still to be put on it) of a folder and its base."""
    is_adapter = (folder / ADAPTER).is_file()
    if is_adapter and holds_step(folder):
        with step_without_adapter(folder) as rest:
            return *load(rest, device="cpu", dtype="auto", model_base=base), True
    if not is_adapter:
        return *load(folder, device="cpu", dtype="auto", model_base=base), False
    has_more = any((folder / name).is_file() for name in TRAINED)
    with without_adapter(folder) as rest:
        opened = {"model_path": rest, "model_base": base} if has_more else {"model_path": base}
        model, processor = load(**opened, device="cpu", dtype="auto")
    return model, processor, True


def with_adapter(model, folder):
    """Return PEFT's model of a model and the LoRA of a folder beside it."""
    with adapter_of_step(folder) if holds_step(folder) else nullcontext(folder) as there:
        return open_adapter(model, there, {})


@contextmanager
def without_adapter(folder):
    """Give a view of a folder that lacks its LoRA: links to all other files."""
    with tempfile.TemporaryDirectory() as rest:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (ADAPTER, *ADAPTER_WEIGHTS):
                os.symlink(path.resolve(), Path(rest) / path.name)
        yield Path(rest)


def round_to(model, dtype) -> None:
    """Cast the weights and not the buffers: rotary frequencies in half precision would be others."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def sees(model) -> bool:
    """Tell whether a model has a vision tower."""
    return is_llava(model.config) and model.config.has_vision_tower


def write_whole(model, processor, folder, max_shard_size):
    """Write every weight with tokenizer and processor."""
    if is_llava(model.config):
        model.config.base_model_name_or_path = None
        model.config.conv_template = processor.conv_template
    savable_view(model).save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)


def answers_of(folder):
    """Return what a folder answers, in float32."""
    model, processor = load(folder, device="cpu", dtype="float32")
    return witness.answers(model.eval(), witness.readings(processor, sees(model)), processor.image_token_index)


def main(argv=None):
    """Run `llava-lite merge`; errors are told in a line by llava_lite.cli."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    for name, as_in_llava in (("source", "model_path"), ("target", "save_model_path")):
        options[name] = options.pop(as_in_llava) or options[name]
        if options[name] is None:
            parser.error(f"{name.upper()} (or --{as_in_llava.replace('_', '-')}) is needed")
    merge(**options)
    return 0
