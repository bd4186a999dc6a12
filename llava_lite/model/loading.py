"""Open a checkpoint as a model: complete, or trained weights on the base that they name.

The class and every option come from config.json, never from the path. Every weight is accounted for.
"""

from __future__ import annotations

import copy
import logging
import re

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_lite.checkpoints.copying import gathered
from llava_lite.checkpoints.files import (
    check_before_opening,
    read_shapes,
    read_trained_shapes,
    read_weight,
    readable_file_errors,
)
from llava_lite.checkpoints.load_report import (
    check_reported_shapes,
    count_partitioned,
    missing_and_unexpected,
    own_accounting,
)
from llava_lite.checkpoints.partial import apply_trained, check_no_missing_or_unexpected
from llava_lite.checkpoints.sizes import check_connector, check_sizes
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import verify_texts
from llava_lite.configuration import own_fields
from llava_lite.formats.llava import clip_config_from_shapes
from llava_lite.hub.errors import CONFIG
from llava_lite.hub.source import VISION_TOWER
from llava_lite.model.attention import choose_attention
from llava_lite.model.decoder_bias import is_added_bias
from llava_lite.model.generation_config import load_generation_config, read_generation_config
from llava_lite.model.moe.upcycle import upcycle
from llava_lite.model.placement import pop_placement, spread
from llava_lite.model.plain_paths import install_fast_paths
from llava_lite.model.quantization import (
    agreed,
    apply_stored,
    check_no_old_switches,
    sparing,
    stored_in_names,
    with_kept_modules,
)
from llava_lite.tower_config import load_vision_config

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower."
CONNECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
PROMPTS = "model.adaption_prompt.query"
IMAGE_VECTORS = (NEWLINE, "model.image_start", "model.image_end")
# Where transformers' Auto classes pass the directory of an adapter; no public keyword does.
ADAPTER_PATH = "_adapter_model_path"
# Weights of a layer of experts that no base has.
ROUTER = re.compile(r"\.mlp\.(gate|coefficient)\.")


class LoadingMixin:
    """`from_pretrained` for a LLaVA model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Return the model of a directory, hub id or Checkpoint, in eval mode.

        Takes the keywords of transformers' `from_pretrained`; attn_implementation may also be "auto" or "varlen"; a
        quantization_config leaves out tower, connector, head and experts unless it names other modules. Raises
        ValueError with the names if a weight is missing or unexpected, unless output_loading_info asks for the names;
        OSError if the vision tower cannot be found.
        """
        checkpoint = Checkpoint.open(pretrained_model_name_or_path, kwargs)
        verify_texts(checkpoint.path)
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        # Without a checkpoint (path None) weights are missing on purpose.
        kwargs["strict"] = checkpoint.path is not None and not output_loading_info
        # The Auto classes pass the choice in the config.
        asked = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
        kwargs["attn_implementation"] = choose_attention(asked)
        check_no_old_switches(kwargs)
        asked = with_kept_modules(kwargs.pop("quantization_config", None))
        with checkpoint.readable_errors():
            model, info = cls._open(checkpoint, *args, config=config, asked=asked, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _open(cls, checkpoint, *args, config, asked=None, adapter_kwargs=None, strict=True, new_parts=(), **kwargs):
        """Open a complete model, or trained weights on their base; return the model and transformers' report.

        asked: a quantization config, or None; not a keyword of its own name, which would replace the config's.
        new_parts: as in open_complete.
        """
        own_directory = (adapter_kwargs or {}).get(ADAPTER_PATH)
        if own_directory not in (None, checkpoint.path):
            # transformers' Auto class followed adapter_config.json to the base, away from the rest of the directory.
            own = Checkpoint(own_directory, **checkpoint.keywords)
            if own.file(CONFIG) is not None:
                checkpoint, config = own, None
            else:
                # There is no rest: an adapter alone, which transformers puts beside the weights of its base.
                kwargs["adapter_kwargs"] = adapter_kwargs
        if config is None:
            config, kwargs = cls._read_config(checkpoint, kwargs)
        kwargs["quantization_config"] = asked
        base = checkpoint.stands_on(config.base_model_name_or_path)
        # Weights of several checkpoints are put together on the CPU, before any is offloaded.
        is_complete = base is None and not (config.has_vision_tower and config.vision_config is None)
        places = {} if is_complete or asked is not None else pop_placement(kwargs)
        if base is None:
            kwargs["new_parts"] = tuple(new_parts)
            model, info = cls.open_complete(checkpoint, config, *args, strict=strict, **kwargs)
        else:
            model, unfilled = cls._open_on_base(checkpoint, base, config, kwargs)
            what = f"{cls.__name__} on its base {base.path!r}"
            unfilled = {name for name in unfilled if not name.startswith(tuple(new_parts) or ("\0",))}
            check_no_missing_or_unexpected(checkpoint, what, unfilled, set())
            info = {}
        return spread(model, **places) if places else model, info

    @classmethod
    def _read_config(cls, checkpoint, kwargs: dict):
        """Return the config of this class from config.json, with the fields among `kwargs`, and the other kwargs."""
        checkpoint.require_config()
        fields = own_fields(copy.deepcopy(checkpoint.fields))
        found, wanted = fields.get("model_type"), cls.config_class.model_type
        if found != wanted:
            logger.warning("%r has model_type %r and is opened as %r.", checkpoint.path, found, wanted)
        # The config would take "auto" for a dtype.
        dtype = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
        config, kwargs = cls.config_class.from_dict(fields, return_unused_kwargs=True, **kwargs)
        return config, kwargs | dtype

    @classmethod
    def open_complete(cls, checkpoint, config, *args, new_parts: tuple[str, ...] = (), strict=True, **kwargs):
        """Return (model, report) of a checkpoint with every weight but `new_parts` (prefixes) and a named tower.

        new_parts has also the names of weights inside the layers, such as gates, each in full.
        """
        config = copy.deepcopy(config)
        tower_is_inside = config.vision_config is not None and TOWER not in new_parts
        state_dict = read_foreign(checkpoint)
        stored = checkpoint.fields.get("quantization_config")
        if state_dict is not None and stored is not None:
            config.quantization_config = stored_in_names(stored, state_dict)
        # Parts that come from elsewhere, or are drawn, are in full precision.
        modules = [part for part in new_parts if not is_inside_layer(part)]
        absent = [part.rstrip(".") for part in {*modules, *([] if tower_is_inside else [TOWER])}]
        stored = apply_stored(config, absent)
        kwargs["quantization_config"] = sparing(agreed(checkpoint, stored, kwargs.get("quantization_config")), absent)
        if config.has_vision_tower and config.vision_config is None:
            config.vision_config = find_vision_config(config.mm_vision_tower, checkpoint, state_dict)
        if config.has_vision_tower and not tower_is_inside:
            check_tower(config.mm_vision_tower, checkpoint, state_dict)
        if checkpoint.path is not None:
            shapes = get_shapes(checkpoint, state_dict)
            check_sizes(checkpoint, config, shapes, with_vision=tower_is_inside)
            check_connector(checkpoint, config, shapes)
        takes_any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        own_generation = kwargs.get("generation_config") is not None
        if state_dict is None and checkpoint.path is not None:
            check_before_opening(checkpoint)
        with own_accounting(), readable_file_errors(checkpoint):
            if state_dict is None and not own_generation:
                kwargs["generation_config"] = read_generation_config(checkpoint, config)
            if state_dict is None:
                model, info = super().from_pretrained(
                    checkpoint.path, *args, config=config, **checkpoint.keywords, **kwargs
                )
            else:
                model, info = super().from_pretrained(None, *args, config=config, state_dict=state_dict, **kwargs)
                model.config.name_or_path = checkpoint.path
            if not own_generation:
                load_generation_config(model, checkpoint, kwargs.get("generation_config"))
        if is_deepspeed_zero3_enabled():
            # Under ZeRO-3 transformers reports missing weights alone.
            info |= count_partitioned(model, get_shapes(checkpoint, state_dict))
        missing, unexpected = missing_and_unexpected(info)
        if not model.config.has_vision_tower:
            # LLaVA saves the tower with the model; a tower that the config does not name is not used.
            unexpected = {k for k in unexpected if not k.startswith(TOWER)}
        if model.get_vision_tower() is not None and not tower_is_inside:
            resolve_tower(model, checkpoint, tower_in_checkpoint=not any(k.startswith(TOWER) for k in missing))
            missing = {k for k in missing if not k.startswith(TOWER)}
        info["new_keys"] = {k for k in missing if k.startswith(new_parts or ("\0",))}
        zero_biases(model, info["new_keys"])
        if strict:
            what = type(model).__name__
            check_no_missing_or_unexpected(checkpoint, what, missing - info["new_keys"], unexpected)
        if not takes_any_shape:
            # The shapes of a tower that is read from elsewhere do not matter.
            prefix = TOWER if model.get_vision_tower() is not None and not tower_is_inside else "\0"
            mismatched = [found for found in info["mismatched_keys"] if not found[0].startswith(prefix)]
            check_reported_shapes(checkpoint, mismatched)
        hold_vectors(model, checkpoint, state_dict)
        # Only now: quantisers replace layers while loading, and look for torch's own class.
        install_fast_paths(model)
        return model, info

    @classmethod
    def _open_on_base(cls, checkpoint, base, config, kwargs):
        """Open trained weights: the base first, then the weights of the checkpoint.

        Returns the model and the names of weights that neither of them holds.
        """
        check_connector(checkpoint, config, read_trained_shapes(checkpoint))
        config = copy.deepcopy(config)
        num_rows, pad_token_id = config.vocab_size, config.pad_token_id
        base_config = config.__class__.from_dict(copy.deepcopy(base.fields))
        config.vocab_size, config.base_model_name_or_path = base_config.vocab_size, None
        # A padding token that was added has no row in the base, which torch would refuse.
        config.pad_token_id = base_config.pad_token_id
        # Of the base's weights; the checkpoint's own, if any, tells their bits during training.
        apply_stored(config, [], getattr(base_config, "quantization_config", None))
        # Experts that were upcycled from the base's MLPs and then trained.
        made, config.moe = (config.moe if not base_config.moe else None), base_config.moe or None
        is_llava = own_fields(base.fields).get("model_type", "").startswith("llava_")
        new_parts = () if is_llava else (CONNECTOR, TOWER)
        new_parts = (*new_parts, *get_new_weights(config, base_config))
        if base_config.vision_config is None:
            new_parts = (*new_parts, TOWER)
        # A stage may start from the directory of another, which holds only trained weights itself.
        base_of_base = base.stands_on(base_config.base_model_name_or_path) if is_llava else None
        if base_of_base is not None:
            model, unfilled = cls._open_on_base(base, base_of_base, config, dict(kwargs))
        else:
            model, info = cls.open_complete(base, config, new_parts=new_parts, **kwargs)
            unfilled = info["new_keys"]
        if made:
            upcycle(model, made)
            unfilled |= {name for name, _ in model.named_parameters() if ROUTER.search(name)}
        model, filled = apply_trained(model, checkpoint, num_rows)
        model.config.pad_token_id = pad_token_id
        if kwargs.get("generation_config") is None:
            load_generation_config(model, checkpoint)
        model.config.name_or_path = checkpoint.path
        return model, unfilled - filled


def get_new_weights(config, base_config=None) -> tuple[str, ...]:
    """Return the names of the weights of a config that a base lacks: image vectors, prompts, gates, added biases.

    base_config: of the base, if it is a model of ours; a plain language model has none of them.
    """
    known = set() if base_config is None else set(get_new_weights(base_config))
    names = [name for name in IMAGE_VECTORS if name.rpartition(".")[2] in config.image_vectors]
    if config.has_prompts:
        names.append(PROMPTS)
        first = config.num_hidden_layers - config.num_prompted_layers
        gates = ["adaption_gate", *(["adaption_new_gate"] if config.adaption_prompt_new_gate else [])]
        layers = range(first, config.num_hidden_layers)
        names += [f"model.layers.{layer}.self_attn.{gate}" for layer in layers for gate in gates]
    places = ("self_attn", "mlp")
    biased = [(place, name) for place in places for name in config.decoder_bias or ()]
    names += [
        f"model.layers.{i}.{place}.{name}.bias" for i in range(config.num_hidden_layers) for place, name in biased
    ]
    return tuple(name for name in names if name not in known)


@torch.no_grad()
def zero_biases(model, names) -> None:
    """Set added biases of the decoder to zero: transformers leaves those of quantised layers as memory had them."""
    added = {name for name in names if is_added_bias(name, model.config.decoder_bias or ())}
    found = [weight for name, weight in model.named_parameters() if name in added and not weight.is_meta]
    with gathered(found, modify=True):
        for weight in found:
            weight.zero_()


def is_inside_layer(name: str) -> bool:
    """Return whether a weight lies in a layer of the decoder."""
    return name.startswith("model.layers.")


def hold_vectors(model, checkpoint, state_dict: dict | None) -> None:
    """Keep the image vectors in memory, whatever the device map: a parameter beside modules has no hook to load it."""
    stack = model.get_model()
    for name in model.config.image_vectors:
        if not getattr(stack, name).is_meta:
            continue
        key = f"model.{name}"
        found = read_weight(checkpoint, key) if state_dict is None else state_dict.get(key)
        if found is not None:
            setattr(stack, name, nn.Parameter(found.to(getattr(stack, name).dtype, copy=True)))


class StackLoadingMixin:
    """`from_pretrained` for a decoder stack, whose `whole_class` is the class that holds it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Return the stack of a checkpoint; by way of the complete model if the weights are in several places."""
        checkpoint = Checkpoint.open(pretrained_model_name_or_path, kwargs)
        fields = checkpoint.fields
        tower_elsewhere = fields.get("mm_vision_tower") is not None and fields.get("vision_config") is None
        if tower_elsewhere or fields.get("base_model_name_or_path") or checkpoint.format is not None:
            return cls.whole_class.from_pretrained(checkpoint, *args, **kwargs).get_model()
        check_before_opening(checkpoint)
        return super().from_pretrained(checkpoint.path, *args, **checkpoint.keywords, **kwargs)


def read_foreign(checkpoint) -> dict | None:
    """Return the weights of a checkpoint of another format under our names, None if the names are ours."""
    if checkpoint.format is None:
        return None
    return checkpoint.format.weights_from(checkpoint.weights(), checkpoint.fields)


def get_shapes(checkpoint, state_dict: dict | None) -> dict:
    """Return the shapes of a checkpoint's weights by our names; state_dict: those of another format, read already."""
    return read_shapes(checkpoint) if state_dict is None else {k: tuple(v.shape) for k, v in state_dict.items()}


def find_vision_config(name: str, checkpoint, state_dict: dict | None = None):
    """Return the config of tower `name`; if it cannot be found, one read off the checkpoint's own tower weights."""
    try:
        return load_vision_config(name, **checkpoint.shared_keywords)
    except OSError as error:
        shapes = get_shapes(checkpoint, state_dict)
        inside = {k[len(TOWER) :]: v for k, v in shapes.items() if k.startswith(TOWER)}
        if not inside:
            raise
        logger.warning("vision tower %r cannot be found (%s); its weights are taken from the checkpoint.", name, error)
        return clip_config_from_shapes(inside)


def check_tower(name: str, checkpoint, state_dict: dict | None) -> None:
    """Raise OSError, before weights are read, for a tower that is neither found by name nor in the checkpoint."""
    try:
        checkpoint.beside(name).check("vision tower", VISION_TOWER)
    except OSError as error:
        if not any(key.startswith(TOWER) for key in get_shapes(checkpoint, state_dict)):
            raise OSError(
                f"{error} The checkpoint holds no weights of it; config.json names it as mm_vision_tower."
            ) from error


def resolve_tower(model, checkpoint, tower_in_checkpoint: bool) -> None:
    """Load the weights of a named tower: from that tower, or from the checkpoint.

    The checkpoint's own are used only if the tower was trained (`unfreeze_mm_vision_tower`) or cannot be found: LLaVA
    saved a copy in half precision and ignored it on load.
    """
    if tower_in_checkpoint and model.config.unfreeze_mm_vision_tower:
        return
    tower = checkpoint.beside(model.config.mm_vision_tower)
    try:
        with tower.readable_errors():
            model.get_vision_tower().load_pretrained(**tower.keywords)
    except OSError as error:
        if not tower_in_checkpoint:
            raise OSError(
                f"vision tower {tower.path!r} cannot be loaded and the checkpoint holds no weights of it ({error}). "
                "Name an existing directory or hub id as mm_vision_tower."
            ) from error
        logger.warning("vision tower %r cannot be found; the checkpoint's copy is used.", tower.path)
