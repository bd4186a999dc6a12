"""Compare the memory that the models of a command need with what is free, before one of them is loaded."""

from collections.abc import Sequence

import torch

from llava_lite.checkpoints.memory import check_fits, free_ram, weight_bytes
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.torch_files import is_torch_checkpoint


def check_memory(models: Sequence[str], options) -> None:
    """Raise ValueError if the weights of all models need more memory than is free; OSError if one is not there.

    models: directories or hub ids. options: model_base, revision, device, load_8bit and load_4bit of the command.
    """
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    needed = sum(get_weight_bytes(model, options, on_gpu) for model in models)
    free = free_ram() + (torch.cuda.mem_get_info(options.device)[0] if on_gpu else 0)
    check_fits(", ".join(models), needed, free)


def get_weight_bytes(model: str, options, on_gpu: bool) -> int:
    """Return the bytes of a model's weights once they are loaded; 0 where only opening it would tell."""
    if is_torch_checkpoint(model):
        return 0
    checkpoint = Checkpoint(model, base=options.model_base, revision=options.revision)
    checkpoint.check()
    bits = 4 if options.load_4bit else 8 if options.load_8bit else None
    parts = [checkpoint] + ([] if checkpoint.base is None else [checkpoint.base])
    return sum(weight_bytes(part, bits, widens_half=not on_gpu) for part in parts)
