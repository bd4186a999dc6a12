"""Turn the model of a run into the small files that make a directory of its weights one that opens as a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from llava_lite.train.final import is_peft, unwrapped, write_config
from llava_lite.train.tuning import compute_dtype


class Opening:
    """What a run writes beside what it has trained: config and base, LoRA's shape, tokenizer, image processor.

    model: the model in training, PEFT's wrapping included, the engine's not. parts: what has a `save_pretrained` of
    its own. base: path or hub id that the run started from. conv_template: name of its prompt format.
    """

    def __init__(self, model, parts: Iterable, base: str, conv_template: str | None):
        self.model, self.parts = model, [part for part in parts if part is not None]
        self.base, self.conv_template = base, conv_template

    def write(self, folder: Path, args) -> None:
        """Write the files, for weights in the dtype that the run will save; args: the run's."""
        inner = unwrapped(self.model)
        dtype = dtype_of_save(inner, args)
        tower_config, own_dtype = inner.config.vision_config, None
        if tower_config is not None:
            # transformers opens a tower in the dtype that its own config names.
            own_dtype, tower_config.dtype = tower_config.dtype, dtype
        try:
            write_config(inner, folder, self.base, self.conv_template, dtype)
        finally:
            if tower_config is not None:
                tower_config.dtype = own_dtype
        if is_peft(self.model):
            config = copy.deepcopy(self.model.peft_config["default"])
            config.inference_mode = True
            config.save_pretrained(folder)
        for part in self.parts:
            part.save_pretrained(folder)


def dtype_of_save(inner, args):
    """Return the dtype that a run saves its model in.

    Without DeepSpeed what trains is kept in float32 for its small updates; a save is as wide as the run's products.
    """
    return inner.dtype if args.uses_deepspeed or args.bits != 16 else compute_dtype(args)
