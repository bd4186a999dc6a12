"""Open a folder or hub repository as a model: whole, or what was trained on top of a named base.

The class and every choice come from config.json, never from the path. Every weight is accounted for.
"""

from __future__ import annotations

import copy
import logging
import re

from torch import nn
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_lite.companions import find_base, read_json
from llava_lite.formats import foreign_format
from llava_lite.formats.llava import clip_config_from_shapes, read_shapes
from llava_lite.hub import HUB_ARGUMENTS, everywhere, hub_arguments, in_words, require_config
from llava_lite.model.accounting import count_partitioned, own_accounting, refuse_shapes, strays
from llava_lite.model.attention import choose_attention
from llava_lite.model.configuration import load_vision_config, own_fields
from llava_lite.model.generation_config import FILE as GENERATION_CONFIG
from llava_lite.model.generation_config import readable_generation_config
from llava_lite.model.partial import base_of, refuse_strays, take_trained
from llava_lite.model.placement import spread, take_places
from llava_lite.model.products import take_faster_products
from llava_lite.model.quantization import (
    agreed,
    refuse_old_switches,
    sparing,
    stored_in_names,
    take_stored,
    with_kept_modules,
)
from llava_lite.model.upcycle import upcycle
from llava_lite.model.weight_files import broken_files_in_words, find_file, read_checkpoint, read_weight
from llava_lite.model_source import VISION_TOWER, check_source

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower."
CONNECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
# Of a layer of experts, what no base has.
ROUTER = re.compile(r"\.mlp\.(gate|coefficient)\.")


class LoadingMixin:
    """`from_pretrained` for a LLaVA model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Return the model of a folder or hub id, in eval mode.

        Takes what transformers' `from_pretrained` takes; attn_implementation may also be "auto" or "varlen", and a
        quantization_config leaves out tower, connector, head and experts unless it names other modules. Raises
        ValueError with the names if a weight is missing or unexpected, unless the caller asks for the names with
        output_loading_info; OSError if the vision tower cannot be found.
        """
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        # Without a checkpoint (path None) what is missing is meant to be drawn.
        kwargs["strict"] = pretrained_model_name_or_path is not None and not output_loading_info
        # The Auto classes hand the choice on in the config.
        asked = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
        kwargs["attn_implementation"] = choose_attention(asked)
        refuse_old_switches(kwargs)
        asked = with_kept_modules(kwargs.pop("quantization_config", None))
        with in_words(pretrained_model_name_or_path, **hub_arguments(kwargs)):
            model, info = cls._open(pretrained_model_name_or_path, *args, config=config, asked=asked, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _open(cls, path, *args, config, asked=None, adapter_kwargs=None, strict=True, **kwargs):
        """Open a whole model, or what was trained on its base; return it and what was missing.

        asked: a quantization config, or None; not a keyword of its own name, which would replace the config's.
        """
        own_folder = (adapter_kwargs or {}).get("_adapter_model_path")
        if own_folder not in (None, path):
            # transformers' Auto class followed adapter_config.json to the base, away from the rest of the folder.
            if find_file(own_folder, "config.json", hub_arguments(kwargs)) is not None:
                path, config = own_folder, None
            else:
                # There is no rest: an adapter alone, which transformers puts beside the weights of its base.
                kwargs["adapter_kwargs"] = adapter_kwargs
        hub = hub_arguments(kwargs)
        if config is None:
            require_config(path, hub)
            # The config would take "auto" for a dtype.
            dtype = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
            kwargs = {**hub, **kwargs, **dtype}
        kwargs["quantization_config"] = asked
        base = base_of(path, config.base_model_name_or_path, hub)
        # Weights of several checkpoints are put together on the CPU, before any is offloaded.
        is_whole = base is None and not (config.has_vision_tower and config.vision_config is None)
        places = {} if is_whole or asked is not None else take_places(kwargs)
        if base is None:
            model, info = cls._open_whole(path, *args, config=config, hub=hub, strict=strict, **kwargs)
        else:
            model, unfilled = cls._open_on_base(path, base, config, hub, kwargs)
            refuse_strays(path, f"{cls.__name__} on its base {base!r}", unfilled, set())
            info = {}
        return spread(model, **places) if places else model, info

    @classmethod
    def _open_whole(cls, path, *args, config, hub, new_parts: tuple[str, ...] = (), strict=True, **kwargs):
        """Open a checkpoint that holds every weight, but for `new_parts` (prefixes) and a tower that is named."""
        config = copy.deepcopy(config)
        tower_is_inside = config.vision_config is not None and TOWER not in new_parts
        state_dict = read_foreign(path, hub)
        if state_dict is not None:
            take_stored_names(config, path, hub, state_dict)
        # Parts that come from elsewhere, or are drawn, are no weights in few bits.
        absent = [part.rstrip(".") for part in {*new_parts, *([] if tower_is_inside else [TOWER])}]
        stored = take_stored(config, absent)
        kwargs["quantization_config"] = sparing(agreed(path, stored, kwargs.get("quantization_config")), absent)
        if config.has_vision_tower and config.vision_config is None:
            config.vision_config = find_vision_config(config.mm_vision_tower, path, hub, state_dict)
        if config.has_vision_tower and not tower_is_inside:
            check_tower(config.mm_vision_tower, path, hub, state_dict)
        takes_any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True
        own_generation = kwargs.get("generation_config") is not None
        with own_accounting(), broken_files_in_words(path, hub):
            if state_dict is None:
                kwargs |= generation_arguments(path, config, hub, kwargs)
                model, info = super().from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
            else:
                kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS} | {"state_dict": state_dict}
                model, info = super().from_pretrained(None, *args, config=config, output_loading_info=True, **kwargs)
                model.config._name_or_path = str(path)
                if not own_generation:
                    take_generation_config(model, path, hub)
        if is_deepspeed_zero3_enabled():
            # There transformers takes the best case for granted and counts the missing alone.
            info |= count_partitioned(model, shapes_of(path, hub, state_dict))
        missing, unexpected = strays(info)
        if not model.config.has_vision_tower:
            # LLaVA saves the tower with the model; one that the config does not name is not used.
            unexpected = {k for k in unexpected if not k.startswith(TOWER)}
        if model.get_vision_tower() is not None and not tower_is_inside:
            settle_tower(model, tower_in_checkpoint=not any(k.startswith(TOWER) for k in missing), hub=hub)
            missing = {k for k in missing if not k.startswith(TOWER)}
        info["new_keys"] = {k for k in missing if k.startswith(new_parts or ("\0",))}
        if strict:
            refuse_strays(path, type(model).__name__, missing - info["new_keys"], unexpected)
        if not takes_any_shape:
            # Of a tower that is not read from here the shapes do not matter.
            prefix = TOWER if model.get_vision_tower() is not None and not tower_is_inside else "\0"
            refuse_shapes(path, [found for found in info["mismatched_keys"] if not found[0].startswith(prefix)])
        hold_newline(model, path, hub, state_dict)
        # Only now: quantisers, which replace layers while loading, look for torch's own class and no other.
        take_faster_products(model)
        return model, info

    @classmethod
    def _open_on_base(cls, path, base: str, config, hub, kwargs):
        """Open a folder that holds what was trained: its base first, then its own weights.

        Returns the model and the names of weights that neither of them holds.
        """
        base, base_hub = find_base(base, path), everywhere(hub)
        config = copy.deepcopy(config)
        num_rows, pad_token_id = config.vocab_size, config.pad_token_id
        base_config = config.__class__.from_dict(config.__class__.get_config_dict(base, **base_hub)[0])
        config.vocab_size, config.base_model_name_or_path = base_config.vocab_size, None
        # A padding token that was added has no row in the base, which torch would refuse.
        config.pad_token_id = base_config.pad_token_id
        # Of the base's weights; the directory's own, if it has one, says how they were held while it was trained.
        take_stored(config, [], getattr(base_config, "quantization_config", None))
        # Experts that were made of the base's MLPs, as copies that training then changed.
        made, config.moe = (config.moe if not base_config.moe else None), base_config.moe or None
        is_llava = has_llava_type(base, base_hub)
        new_parts = () if is_llava else (CONNECTOR, TOWER)
        if "unpad" not in base_config.mm_patch_merge_type:
            new_parts = (*new_parts, NEWLINE)
        if base_config.vision_config is None:
            new_parts = (*new_parts, TOWER)
        base_kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS} | base_hub
        # A stage that started from the folder of another, itself only what was trained.
        base_of_base = base_of(base, base_config.base_model_name_or_path, base_hub) if is_llava else None
        if base_of_base is not None:
            model, unfilled = cls._open_on_base(base, base_of_base, config, base_hub, base_kwargs)
        else:
            model, info = cls._open_whole(base, config=config, hub=base_hub, new_parts=new_parts, **base_kwargs)
            unfilled = info["new_keys"]
        if made:
            upcycle(model, made)
            unfilled |= {name for name, _ in model.named_parameters() if ROUTER.search(name)}
        model, filled = take_trained(model, path, num_rows, hub)
        model.config.pad_token_id = pad_token_id
        if kwargs.get("generation_config") is None:
            take_generation_config(model, path, hub)
        model.config._name_or_path = str(path)
        return model, unfilled - filled


def hold_newline(model, path, hub: dict, state_dict: dict | None) -> None:
    """Keep the newline in memory, whatever a device map says: a parameter beside modules has no hook to bring it."""
    if not model.config.has_newline or not model.get_model().image_newline.is_meta:
        return
    found = read_weight(path, NEWLINE, hub) if state_dict is None else state_dict.get(NEWLINE)
    if found is not None:
        stack = model.get_model()
        stack.image_newline = nn.Parameter(found.to(stack.image_newline.dtype, copy=True))


def has_llava_type(path, hub: dict) -> bool:
    """Tell a LLaVA checkpoint of any format from a plain language model."""
    return own_fields(read_json(path, "config.json", hub)).get("model_type", "").startswith("llava_")


class StackLoadingMixin:
    """`from_pretrained` for a decoder stack, whose `whole_class` is the class that holds it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Return the stack of a folder or hub id, of the whole model where its parts lie in several places."""
        path, hub = pretrained_model_name_or_path, hub_arguments(kwargs)
        fields = read_json(path, "config.json", hub) if path is not None else {}
        tower_elsewhere = fields.get("mm_vision_tower") is not None and fields.get("vision_config") is None
        if tower_elsewhere or fields.get("base_model_name_or_path") or foreign_format(fields) is not None:
            return cls.whole_class.from_pretrained(path, *args, **kwargs).get_model()
        return super().from_pretrained(path, *args, **kwargs)


def read_foreign(path, hub: dict) -> dict | None:
    """Return the weights of a checkpoint under our names if it carries another format's, None if it carries ours."""
    fields = read_json(path, "config.json", hub) if path is not None else {}
    foreign = foreign_format(fields)
    return None if foreign is None else foreign.weights_from(read_checkpoint(path, hub), fields)


def take_stored_names(config, path, hub: dict, state_dict: dict) -> None:
    """Give a config of ours the quantization_config of another format's config.json, if that has one."""
    stored = read_json(path, "config.json", hub).get("quantization_config")
    if stored is not None:
        config.quantization_config = stored_in_names(stored, state_dict)


def generation_arguments(path, config, hub: dict, given: dict) -> dict:
    """Return the keyword of `from_pretrained` for a generation config that transformers could not read, else {}.

    given: the caller's keywords; a generation config among them stays.
    """
    if given.get("generation_config") is not None:
        return {}
    readable = readable_generation_config(path, config, hub)
    return {} if readable is None else {"generation_config": readable}


def take_generation_config(model, path, hub: dict) -> None:
    """Give a model the generation_config.json of a directory or hub id, where it has one."""
    if find_file(path, GENERATION_CONFIG, hub) is None:
        return
    readable = readable_generation_config(path, model.config, hub)
    model.generation_config = GenerationConfig.from_pretrained(path, **hub) if readable is None else readable


def shapes_of(path, hub: dict, state_dict: dict | None) -> dict:
    """Return the shapes of a checkpoint's weights by our names; state_dict: those of another format, read already."""
    return read_shapes(path, **hub) if state_dict is None else {k: tuple(v.shape) for k, v in state_dict.items()}


def find_vision_config(name: str, path, hub: dict, state_dict: dict | None = None):
    """Return the config of tower `name`; if it cannot be found, one read off the checkpoint's own tower weights."""
    try:
        return load_vision_config(name, **everywhere(hub))
    except OSError as error:
        shapes = shapes_of(path, hub, state_dict)
        inside = {k[len(TOWER) :]: v for k, v in shapes.items() if k.startswith(TOWER)}
        if not inside:
            raise
        logger.warning("vision tower %r cannot be found (%s); its weights are taken from the checkpoint.", name, error)
        return clip_config_from_shapes(inside)


def check_tower(name: str, path, hub: dict, state_dict: dict | None) -> None:
    """Raise OSError, before weights are read, for a tower that is not there and not in the checkpoint either."""
    try:
        check_source(name, "vision tower", VISION_TOWER, **everywhere(hub))
    except OSError as error:
        if not any(key.startswith(TOWER) for key in shapes_of(path, hub, state_dict)):
            raise OSError(
                f"{error} The checkpoint holds no weights of it; config.json names it as mm_vision_tower."
            ) from error


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
