"""Write the directory that a stage leaves: the full model, or the trained weights and the name of their base."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_lite.checkpoints.copying import gathered
from llava_lite.checkpoints.vocabulary import is_row_name
from llava_lite.distributed.ranks import raise_together
from llava_lite.errors import get_free_space
from llava_lite.formats.llava import plain_name
from llava_lite.model.generation_config import write_generation_config
from llava_lite.model.new_words import grown_layers, with_new_rows
from llava_lite.train.deepspeed.experts import with_all_experts
from llava_lite.train.monitor.finite import NonFiniteError, find_in, list_names
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.final_files import write_list
from llava_lite.train.saving.same_run import TRAINER_STATE
from llava_lite.train.saving.trained_weights import PROJECTOR, TRAINED, projector_state, trained_state
from llava_lite.train.together import together
from llava_lite.train.tuning import compute_dtype

logger = logging.getLogger(__name__)

STAGED = f"{paper.STAGING_PREFIX}final"
# Files of an earlier run that this one would not overwrite.
STALE = ("model*.safetensors*", "pytorch_model*", "adapter_*", "non_lora_trainables.bin")


def save_final(
    model,
    output_dir: str | Path,
    *,
    parts: Iterable = (),
    base: str | None = None,
    full: bool = False,
    conv_template: str | None = None,
    card: str | None = None,
    is_writer: bool = True,
) -> None:
    """Write the final directory of a stage; all ranks must call it, those with `is_writer` write.

    model: the model in training, PEFT's wrapping included, the engine's not. parts: what has a `save_pretrained` of
    its own (tokenizer, image processor, processor). base: path or hub id of what the stage started from; needed unless
    `full`. full: write every weight (LoRA merged), else trained.safetensors and, of a PEFT model, the adapter.
    conv_template: name of the conversation template of the training. card: text of README.md. Raises SaveError on
    every rank, with the bytes needed and free, if one cannot write; an earlier directory is then unchanged.
    """
    if full and is_quantised(model):
        logger.warning("LoRA cannot be merged into 4 or 8 bit weights without loss: only trained weights are written.")
        full = False
    if not full and base is None:
        raise ValueError("a directory with only trained weights must name its base; give base= or full=True.")
    output_dir = Path(output_dir)
    staged = output_dir / STAGED
    weights = full_state(model, is_writer) if full else trained_state(model, is_writer, buffers=False)
    projector = projector_state(model, keep=is_writer)
    check_finite(model, weights, projector, output_dir)
    needed_bytes = num_bytes(weights) + num_bytes(projector)
    kept = [path.name for path in paper.checkpoints_in(output_dir)[:1]]
    advice = (
        f"Could not write the model to {output_dir}: about {needed_bytes:,} bytes are needed"
        f"{get_free_space(output_dir)}. An earlier model there is as it was; "
        + (f"{kept[0]} holds the state: make room and start again." if kept else "there is no checkpoint-N.")
    )
    with together(paper.SaveError, advice):
        if is_writer:
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir(parents=True)
                paper.check_room(output_dir, needed_bytes)
                write_directory(model, staged, weights, projector, None if full else base, conv_template)
                save_parts(parts, staged)
                if card is not None:
                    (staged / "README.md").write_text(card, encoding="utf-8")
                write_list(staged)
                move_into_place(staged, output_dir)
            finally:
                shutil.rmtree(staged, ignore_errors=True)


def check_finite(model, weights: dict, projector: dict, output_dir: Path) -> None:
    """Raise NonFiniteError on all ranks if a weight to be written is not finite; buffers may hold infinities."""
    buffers = {plain_name(name) for name, _ in unwrapped(model).named_buffers()}
    names = find_in((name, weight) for name, weight in (weights | projector).items() if name not in buffers)
    error = NonFiniteError(f"not finite: {list_names(names)}") if names else None
    in_half = any(weight.dtype == torch.float16 for weight in (weights | projector).values())
    advice = (
        "float16 cannot hold the numbers of the last checkpoint-N: train with --bf16 True instead of --fp16 True."
        if in_half
        else "Every number was finite in its last step: start again from the last checkpoint-N."
    )
    raise_together(error, NonFiniteError, f"The model is not written to {output_dir}. {advice}")


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


def full_state(model, keep: bool) -> dict[str, torch.Tensor]:
    """Return every weight under the plain model's names, with LoRA and the rows of new tokens merged.

    Under ZeRO-3 all ranks must call this. Tied names have one tensor. Ranks without `keep` get {}.
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
                value = weight.detach() if lora is None else merged(weight, lora)
                value = value if own is None else with_new_rows(value, own)
                copies[id(weight)] = value.to("cpu", copy=True)
        if keep:
            state[plain_name(name)] = copies[id(weight)]
    return with_all_experts(model, state, keep)


def lora_modules(model) -> Iterable[tuple[str, torch.nn.Module]]:
    """Return the modules to which PEFT added LoRA, by name."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")]


def merged(weight: torch.Tensor, module) -> torch.Tensor:
    """Return the base weight plus the module's low-rank update."""
    update = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
    return weight.detach() + update.to(weight.dtype)


def write_directory(model, directory: Path, weights, projector, base: str | None, conv_template: str | None) -> None:
    """Write config and weights; with a `base` the weights are a part of the model."""
    if projector:
        torch.save(projector, directory / PROJECTOR)
    inner = unwrapped(model)
    if base is None:
        own_config, inner.config = inner.config, resolved_config(inner, None, conv_template)
        try:
            inner.save_pretrained(directory, state_dict=weights)
        finally:
            inner.config = own_config
        return
    write_config(inner, directory, base, conv_template)
    others = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    save_file({plain_name(name): weight for name, weight in others.items()}, directory / TRAINED, {"format": "pt"})
    if is_peft(model):
        adapter = {name: weight for name, weight in weights.items() if name not in others}
        # "auto" would open the base's config, with a warning, to compare vocabulary sizes; trained embeddings are
        # among the others.
        model.save_pretrained(directory, state_dict=adapter, save_embedding_layers=False)
        # LLaVA's own loader looks for this file and these names.
        torch.save(others, directory / "non_lora_trainables.bin")


def resolved_config(inner, base: str | None, conv_template: str | None):
    """Return the config of a model that is written, on its base if there is one."""
    config = copy.deepcopy(inner.config)
    config.conv_template = conv_template or config.conv_template
    config.base_model_name_or_path = base and findable(base)
    config.use_cache = True
    return config


def write_config(inner, directory: Path, base: str, conv_template: str | None = None, dtype=None) -> None:
    """Write the files that name the model of a part of its weights: config, base, generation config.

    dtype: of the weights when they are loaded, the tower's too; None for that of the model.
    """
    config = resolved_config(inner, base, conv_template)
    # How the base was loaded for this run; its own config.json has how it is stored.
    vars(config).pop("quantization_config", None)
    # The tower is found again when the directory is opened, from any working directory.
    config.mm_vision_tower = config.mm_vision_tower and findable(config.mm_vision_tower)
    config.architectures, config.dtype = [type(inner).__name__], inner.dtype if dtype is None else dtype
    if dtype is not None and config.vision_config is not None:
        # transformers opens a tower in the dtype that its own config names.
        config.vision_config.dtype = dtype
    config.save_pretrained(directory)
    write_generation_config(inner.generation_config, directory)


def write_opening(model, parts: Iterable, base: str, conv_template: str | None, directory: Path, args) -> None:
    """Write what a run needs beside its trained weights to open as a model; the arguments are those of save_final.

    Config and base, LoRA's config, tokenizer, image processor, for weights in the dtype that the run will save. args:
    the run's.
    """
    inner = unwrapped(model)
    # Without DeepSpeed trained weights are in float32 for small updates; a save has the dtype of the forward pass.
    keeps_dtype = args.uses_deepspeed or args.bits != 16
    write_config(inner, directory, base, conv_template, inner.dtype if keeps_dtype else compute_dtype(args))
    if is_peft(model):
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(directory)
    save_parts(parts, directory)


def save_parts(parts: Iterable, directory: Path) -> None:
    """Write tokenizer, image processor and the like; what a run does not have is None."""
    for part in parts:
        if part is not None:
            part.save_pretrained(directory)


def findable(name: str) -> str:
    """Return the absolute path of a directory that exists, and a hub id as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def set_averaged_weights(trainer) -> None:
    """Set the averaged weights of a schedule-free optimizer, as an evaluation does; a best model has them already."""
    averages = getattr(trainer.optimizer, "eval", None)
    has_best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    if averages is not None and not has_best:
        averages()


def write_state(trainer) -> None:
    """Write the trainer's state beside the model, completely or not at all; all ranks must call it."""
    directory = Path(trainer.args.output_dir)
    advice = f"Could not write {TRAINER_STATE} to {directory}{get_free_space(directory)}; the model is written."
    with together(paper.SaveError, advice):
        if trainer.args.should_save:
            with tempfile.TemporaryDirectory(dir=directory, prefix=paper.STAGING_PREFIX) as there:
                trainer.state.save_to_json(os.path.join(there, TRAINER_STATE))
                os.replace(os.path.join(there, TRAINER_STATE), directory / TRAINER_STATE)
            paper.fsync(directory / TRAINER_STATE)


def move_into_place(staged: Path, output_dir: Path) -> None:
    """Move the written files to their place: config.json last, so that half a directory does not open as a model."""
    names = paper.list_files(staged)
    paper.as_readable_as(staged, names, staged / "config.json")
    paper.fsync_tree(staged, names)
    # Needs room: while the earlier model is complete.
    for name in names:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").unlink(missing_ok=True)
    for pattern in (*STALE, TRAINED):
        for path in output_dir.glob(pattern):
            path.unlink()
    for name in sorted(names, key=lambda name: name == "config.json"):
        os.replace(staged / name, output_dir / name)
    paper.fsync(output_dir)
