"""Check that every weight that a run starts from is finite, and name the flag that one which is not came from.

Frozen ones too, and those that this run neither reads nor writes, such as the layers of a tower after the one that is
selected: a forward pass may meet any of them, and a complete model that holds one is never written (final.py). Found
at its end, the run would be lost.
"""

import logging
import time

import torch

from llava_lite.checkpoints.config import is_llava
from llava_lite.checkpoints.copying import clear_fill, gathered, own_part
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.distributed.ranks import everyone
from llava_lite.train.monitor.finite import NonFiniteError, find_in_each, list_names
from llava_lite.train.tuning import compute_dtype, count, get_part

logger = logging.getLogger(__name__)


def check_weights(model, model_args, training_args) -> None:
    """Raise NonFiniteError, on all ranks, that names the weights which are not finite, and where each came from.

    Before PEFT, experts and engine: what these add is drawn or copied. One pass over the memory; of ZeRO-3 each rank
    looks at its part. Weights in 4 or 8 bits, and those that lie on disk, are not looked at.
    """
    began_s, dtype = time.monotonic(), compute_dtype(training_args)
    clear_fill(model.parameters())
    counts = count_non_finite(model, dtype)
    if not counts:
        logger.info("all weights are finite (checked in %.1f s).", time.monotonic() - began_s)
        return
    places = {}
    for name, text in counts.items():
        places.setdefault(get_source(name, model, model_args, training_args), []).append(f"{name} ({text})")
    found = "; ".join(f"{list_names(names)}, from {source}" for source, names in places.items())
    in_half = (
        " Where the file is finite, float16 cannot hold its numbers: train with --bf16 True instead of --fp16 True."
        if dtype == torch.float16
        else ""
    )
    raise NonFiniteError(
        f"not finite: {found}. No step was taken, since the trained model could not be written. Fetch the file again "
        f"if it was damaged on its way, or else replace these numbers in it, by 0 where nothing reads them.{in_half}"
    )


def count_non_finite(model, dtype: torch.dtype) -> dict[str, str]:
    """Return "1 of 4,096 numbers" for each weight with numbers that are not finite in `dtype`; all ranks must call it.

    dtype: in which the run will save its model.
    """
    params = dict(model.named_parameters())
    own = find_in_each(((name, own_part(param)) for name, param in params.items()), dtype)
    counts = {}
    for name in sorted({name for names in everyone(own) for name in names}):
        with gathered([params[name]]):
            num = int((~params[name].detach().to(dtype).isfinite()).sum())
        if num:
            counts[name] = f"{num:,} of {count(params[name]):,} numbers"
    return counts


def get_source(name: str, model, model_args, training_args) -> str:
    """Return the flag, with its value, that a weight of this name was read by."""
    part, base = get_part(name), f"--model_name_or_path {model_args.model_name_or_path}"
    tower, adapter = model_args.vision_tower, model_args.pretrain_mm_mlp_adapter
    if part == "vision_tower":
        own = f"{base} or its tower, {model.config.mm_vision_tower}"
        if tower is None:
            return own
        # A model of ours may hold a tower that was trained with it.
        is_ours = is_llava(Checkpoint.of_flag(model_args.model_name_or_path, training_args.cache_dir).config)
        return f"--vision_tower {tower}" + (f" or {base}" if is_ours else "")
    if adapter is not None and part == "mm_projector":
        return f"--pretrain_mm_mlp_adapter {adapter}"
    # It may hold rows of new tokens.
    holds_rows = adapter is not None and part == "embeddings" and model.config.new_words
    return f"{base} or --pretrain_mm_mlp_adapter {adapter}" if holds_rows else base
