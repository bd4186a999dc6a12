"""Open a folder or hub repository as a model: whole, or what was trained on top of a named base.

The class and every choice come from config.json, never from the path. Every weight is accounted for.
"""

from __future__ import annotations

import copy
import logging
import re
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import cached_file

from llava_lite.companions import read_json
from llava_lite.formats import foreign_format
from llava_lite.formats.llava import clip_config_from_shapes, read_shapes
from llava_lite.hub import HUB_ARGUMENTS, everywhere, hub_arguments, in_words
from llava_lite.model.attention import choose_attention
from llava_lite.model.configuration import load_vision_config
from llava_lite.model.weight_files import find_file, read_checkpoint
from llava_lite.model.weights import check_shapes, gathered, read_weights

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower."
CONNECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
# Written by old transformers versions; the constructor computes them.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|\.masked_bias$")


class LoadingMixin:
    """`from_pretrained` for a LLaVA model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Return the model of a folder or hub id, in eval mode.

        Takes what transformers' `from_pretrained` takes; attn_implementation may also be "auto" or "varlen". Raises
        ValueError with the names if a weight is missing or unexpected, OSError if the vision tower cannot be found.
        """
        kwargs["attn_implementation"] = choose_attention(kwargs.pop("attn_implementation", None))
        with in_words(pretrained_model_name_or_path, **hub_arguments(kwargs)):
            model, info = cls._open(pretrained_model_name_or_path, *args, config=config, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _open(cls, pretrained_model_name_or_path, *args, config, **kwargs):
        """Open a whole model, or what was trained on its base; return it and what was missing."""
        hub = hub_arguments(kwargs)
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs = {**hub, **kwargs}
        if config.base_model_name_or_path:
            return cls._open_on_base(pretrained_model_name_or_path, config, hub, kwargs), {}
        return cls._open_whole(pretrained_model_name_or_path, *args, config=config, hub=hub, **kwargs)

    @classmethod
    def _open_whole(cls, path, *args, config, hub, new_parts: tuple[str, ...] = (), **kwargs):
        """Open a checkpoint that holds every weight, but for `new_parts` (prefixes) and a tower that is named."""
        config = copy.deepcopy(config)
        tower_is_inside = config.vision_config is not None and TOWER not in new_parts
        state_dict = read_foreign(path, hub)
        if config.has_vision_tower and config.vision_config is None:
            config.vision_config = find_vision_config(config.mm_vision_tower, path, hub)
        with own_accounting():
            if state_dict is None:
                model, info = super().from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
            else:
                kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS} | {"state_dict": state_dict}
                model, info = super().from_pretrained(None, *args, config=config, output_loading_info=True, **kwargs)
                model.config._name_or_path = str(path)
                take_generation_config(model, path, hub)
        missing = {k for k in info["missing_keys"] if not DERIVED.search(k)}
        unexpected = {k for k in info["unexpected_keys"] if not DERIVED.search(k)}
        if not model.config.has_vision_tower:
            # LLaVA saves the tower with the model; one that the config does not name is not used.
            unexpected = {k for k in unexpected if not k.startswith(TOWER)}
        if model.get_vision_tower() is not None and not tower_is_inside:
            settle_tower(model, tower_in_checkpoint=not any(k.startswith(TOWER) for k in missing), hub=hub)
            missing = {k for k in missing if not k.startswith(TOWER)}
        missing = {k for k in missing if not k.startswith(new_parts or ("\0",))}
        refuse_strays(path, type(model).__name__, missing, unexpected)
        return model, info

    @classmethod
    def _open_on_base(cls, path, config, hub, kwargs):
        """Open a folder that holds what was trained: the base it names first, then its own weights."""
        base = find_base(config.base_model_name_or_path, path)
        config = copy.deepcopy(config)
        base_config, _ = config.__class__.get_config_dict(base, **everywhere(hub))
        # A stage that started from the folder of another, itself only what was trained.
        config.base_model_name_or_path = base_config.get("base_model_name_or_path")
        new_parts = () if base_config.get("model_type", "").startswith("llava") else (CONNECTOR, TOWER)
        if "unpad" not in base_config.get("mm_patch_merge_type", "flat"):
            new_parts = (*new_parts, NEWLINE)
        if base_config.get("vision_config") is None:
            new_parts = (*new_parts, TOWER)
        base_kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS} | everywhere(hub)
        if config.base_model_name_or_path:
            model = cls._open_on_base(base, config, everywhere(hub), base_kwargs)
        else:
            model, _ = cls._open_whole(base, config=config, hub=everywhere(hub), new_parts=new_parts, **base_kwargs)
        trained = cached_file(path, "trained.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
        trained = trained or cached_file(path, "mm_projector.bin", **hub)
        load_trained(model, read_weights(trained), f"weights of {trained!r}")
        if cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            model = merge_adapter(model, path, hub)
        model.config._name_or_path = str(path)
        return model


def read_foreign(path, hub: dict) -> dict | None:
    """Return the weights of a checkpoint under our names if it carries another format's, None if it carries ours."""
    fields = read_json(path, "config.json", hub) if path is not None else {}
    foreign = foreign_format(fields)
    return None if foreign is None else foreign.weights_from(read_checkpoint(path, hub), fields)


def take_generation_config(model, path, hub: dict) -> None:
    """Give a model the generation_config.json of a folder or hub id, where it has one."""
    if find_file(path, "generation_config.json", hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


@contextmanager
def own_accounting():
    """Drop transformers' report of missing weights: new parts are meant to be missing, all else raises here."""
    source = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(is_no_report)
    try:
        yield
    finally:
        source.removeFilter(is_no_report)


def find_vision_config(name: str, path, hub: dict):
    """Return the config of tower `name`; if it cannot be found, one read off the checkpoint's own tower weights."""
    try:
        return load_vision_config(name, **everywhere(hub))
    except OSError as error:
        shapes = read_shapes(path, **hub)
        inside = {k[len(TOWER) :]: v for k, v in shapes.items() if k.startswith(TOWER)}
        if not inside:
            raise
        logger.warning("vision tower %r cannot be found (%s); its weights are taken from the checkpoint.", name, error)
        return clip_config_from_shapes(inside)


def settle_tower(model, tower_in_checkpoint: bool, hub: dict) -> None:
    """Give the tower its weights where the checkpoint names a tower: from that tower, or from the checkpoint.

    The checkpoint's own count only if the tower was trained (`unfreeze_mm_vision_tower`) or cannot be found: LLaVA
    saved a copy in half precision and ignored it on load.
    """
    if tower_in_checkpoint and model.config.unfreeze_mm_vision_tower:
        return
    try:
        with in_words(model.config.mm_vision_tower, **everywhere(hub)):
            model.get_vision_tower().load_pretrained(**everywhere(hub))
    except OSError as error:
        if not tower_in_checkpoint:
            raise OSError(
                f"vision tower {model.config.mm_vision_tower!r} cannot be loaded and the checkpoint holds no weights "
                f"of it ({error}). Name an existing folder or hub id as mm_vision_tower."
            ) from error
        logger.warning("vision tower %r cannot be found; the checkpoint's copy is used.", model.config.mm_vision_tower)


def refuse_strays(path, class_name: str, missing: set[str], unexpected: set[str]) -> None:
    """Raise ValueError naming weights that the checkpoint lacks or the model has no place for."""
    if not missing and not unexpected:
        return
    found = [
        f"{len(keys)} {word}, such as {sorted(keys)[:5]}"
        for keys, word in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
    raise ValueError(
        f"weights of {str(path)!r} do not fit {class_name}: {'; '.join(found)}. "
        "Its config.json and its weights disagree, or the checkpoint is incomplete."
    )


def find_base(base: str, path) -> str:
    """Return the base as it can be opened: a hub id or folder as named, else beside the partial folder."""
    if Path(base).exists() or Path(base).is_absolute():
        found = base
    else:
        beside = Path(path) / base
        found = str(beside) if beside.exists() else base
    if Path(found).is_absolute() and not Path(found).exists():
        raise OSError(
            f"{str(path)!r} holds only what was trained; its base {base!r} is not there. Move the base back, correct "
            "base_model_name_or_path in its config.json, or train with --save_full True."
        )
    return found


def load_trained(model, state_dict: dict, what: str) -> None:
    """Copy a part of the weights by name; a name or shape that the model lacks is an error."""
    import torch

    targets = dict(model.named_parameters())
    unknown = sorted(set(state_dict) - set(targets))
    if unknown:
        raise ValueError(
            f"{what}: the model has no {unknown[:5]} ({len(unknown)} in all); its config names another shape."
        )
    targets = {k: targets[k] for k in state_dict}
    check_shapes(targets, state_dict, what)
    with torch.no_grad(), gathered(targets.values(), modify=True):
        for name, target in targets.items():
            if target.numel():
                target.copy_(state_dict[name])


def merge_adapter(model, path, hub: dict):
    """Fold the LoRA of a folder into the model's weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} holds a LoRA adapter; install peft (pip install 'llava-lite[peft]')."
        ) from error
    return PeftModel.from_pretrained(
        model, path, **{k: v for k, v in hub.items() if k != "force_download"}
    ).merge_and_unload()
