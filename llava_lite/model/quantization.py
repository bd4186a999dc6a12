"""Turn a request for 4 or 8 bits and the bits that a checkpoint holds into one quantization config, or refuse.

bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) and NF4 (Dettmers et al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig

logger = logging.getLogger(__name__)

# Modules that stay in their own dtype unless the caller names others. Experts and router are no nn.Linear, the only
# class that bitsandbytes replaces. transformers compares with the start and the end of a module's full name:
# "mm_projector" alone would not match model.mm_projector.0.
NOT_QUANTIZED = ["lm_head", "model.mm_projector", "model.vision_tower", "coefficient", "experts"]
# The attribute that names these modules, in the configs of transformers' methods.
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
KEY = "quantization_config"
# Tables that bitsandbytes saves beside a weight of 4 bits and of 8.
TABLES = re.compile(r"\.(weight\.absmax|SCB)$")
METHOD = "bitsandbytes"


def bits_config(bits: int, **options) -> BitsAndBytesConfig:
    """Return LLaVA's config of 4 or 8 bits; NOT_QUANTIZED lists the modules in full precision.

    options: keywords of BitsAndBytesConfig that replace LLaVA's, such as bnb_4bit_compute_dtype.
    """
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    usual = {
        "bnb_4bit_compute_dtype": torch.float16,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
    }
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED), **usual | options)


def one_request(load_8bit: bool, load_4bit: bool, given):
    """Return the config that LLaVA's two switches or quantization_config ask for; None for neither."""
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; choose one.")
    if not load_8bit and not load_4bit:
        return with_kept_modules(given)
    bits = 8 if load_8bit else 4
    need_bitsandbytes(f"load_{bits}bit=True")
    if given is not None:
        raise ValueError(f"load_{bits}bit=True and quantization_config both ask for quantisation; give one.")
    return bits_config(bits)


def check_no_old_switches(arguments: dict) -> None:
    """Raise ValueError for the keywords of transformers 4, which 5 would hand to the model's constructor."""
    found = [name for name in ("load_in_4bit", "load_in_8bit") if name in arguments]
    if found:
        raise ValueError(
            f"{found[0]} is no keyword of from_pretrained since transformers 5. Give quantization_config="
            f"BitsAndBytesConfig({found[0]}=True), or {found[0].replace('_in', '')}=True to llava_lite.load."
        )


def with_kept_modules(given):
    """Return a copy of a quantization config (or its dict) that leaves tower, connector, head and experts as they are.

    Modules that the caller names, an empty list too, replace these. Raises ValueError for anything else.
    """
    if given is None:
        return None
    config = _from_fields(given) if isinstance(given, dict) else copy.deepcopy(given)
    if not hasattr(config, "quant_method"):
        raise ValueError(
            f"quantization_config is {given!r}; give a config such as transformers.BitsAndBytesConfig"
            "(load_in_4bit=True), or its fields as a dict."
        )
    if _is_bitsandbytes(config):
        if not (config.load_in_4bit or config.load_in_8bit):
            raise ValueError("quantization_config names bitsandbytes and no bits; set load_in_4bit or load_in_8bit.")
        need_bitsandbytes("quantization_config")
    for name in SKIPPED:
        if hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(NOT_QUANTIZED))
    return config


def stored_quantization(checkpoint) -> dict | None:
    """Return the quantization_config of the weights of a `source.Checkpoint`, None for weights in full precision.

    Of trained weights on a base it is the base's; their own config.json tells the bits of the base during training.
    """
    while checkpoint.base is not None:
        checkpoint = checkpoint.base
    return checkpoint.fields.get(KEY)


def apply_stored(config, absent: list[str], *replacement) -> dict | None:
    """Return a model config's quantization_config, None for full precision; a null in the config is removed.

    absent: modules that the checkpoint does not hold; they are listed as in full precision. replacement: a
    quantization_config in place of the config's.
    """
    stored = replacement[0] if replacement else getattr(config, KEY, None)
    if hasattr(config, KEY):
        # transformers tests whether the attribute exists, not its value.
        delattr(config, KEY)
    if stored is not None:
        config.quantization_config = stored = sparing(_get_fields(stored), absent)
    return stored


def stored_in_names(stored: dict, names) -> dict:
    """Return the fields of a quantization_config, the modules in full precision named as in `names`, those of weights.

    For weights that were renamed. bitsandbytes stores a table beside each quantized weight; the others are in full
    precision.
    """
    if get_bits(stored) is None:
        return stored
    tables = (TABLES.search(name) for name in names)
    in_bits = {match.string[: match.start()] for match in tables if match is not None}
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return stored | {SKIPPED[0]: sorted(modules - in_bits)}


def sparing(config, names: list[str]):
    """Return a quantization config, or its fields, that also leaves these modules in full precision; None for None."""
    if config is None or not names:
        return config
    fields = _get_fields(config)
    key = next((key for key in SKIPPED if key in fields), None)
    if key is None:
        return config
    # If no module is named, transformers leaves the head in full precision.
    spared = [*(["lm_head"] if fields[key] is None else fields[key]), *names]
    if isinstance(config, dict):
        return fields | {key: spared}
    config = copy.deepcopy(config)
    setattr(config, key, spared)
    return config


def agreed(path, stored, asked):
    """Return the config to quantise with while loading: the request, None if the weights are quantized already.

    stored: that of config.json, or None. Raises ValueError if they differ, since quantized weights are not converted
    to other bits.
    """
    if get_bits(stored) is not None:
        need_bitsandbytes(f"{str(path)!r} holds {get_quantization_kind(stored)} weights, and reading them")
    if stored is None or asked is None:
        return asked
    if get_quantization_kind(stored) != get_quantization_kind(asked):
        raise ValueError(
            f"{str(path)!r} holds {get_quantization_kind(stored)} weights, and {get_quantization_kind(asked)} were "
            "asked for. Leave the request out to open them as they are, or quantise the weights in full precision."
        )
    stored, asked = _get_fields(stored), _get_fields(asked)
    names = [name for name in asked if name in stored and name not in SKIPPED]
    others = [f"{name} {asked[name]!r}" for name in names if asked[name] != stored[name]]
    if others:
        logger.warning(
            "%r holds %s weights, which stay as they are: not %s.",
            path,
            get_quantization_kind(stored),
            ", ".join(others),
        )
    return None


def get_quantization_kind(config) -> str:
    """Return the name of what a quantization config makes of weights, such as "4-bit"."""
    fields = _get_fields(config)
    for bits in (4, 8):
        if fields.get(f"load_in_{bits}bit"):
            return f"{bits}-bit"
    method, bits = fields.get("quant_method"), fields.get("bits")
    return f"{getattr(method, 'value', method)}{f' {bits}-bit' if bits else ''}"


def get_bits(config) -> int | None:
    """Return 4 or 8 for a config of bitsandbytes, None for any other and for none."""
    fields = {} if config is None else _get_fields(config)
    return next((bits for bits in (4, 8) if fields.get(f"load_in_{bits}bit")), None)


def need_bitsandbytes(what: str) -> None:
    """Raise ImportError with the command that installs bitsandbytes, if it is missing. what: what needs it."""
    if importlib.util.find_spec(METHOD) is None:
        raise ImportError(f"{what} needs {METHOD}: pip install 'llava-lite[quant]'.")


def _from_fields(fields: dict):
    """Return the config of a dict, as transformers reads it from config.json; ValueError for a name it ignores."""
    try:
        config = AutoQuantizationConfig.from_dict(dict(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization_config {fields!r} is none that transformers knows: {error}") from error
    unknown = [name for name in fields if name not in _get_fields(config) and not hasattr(config, name)]
    if unknown:
        raise ValueError(
            f"quantization_config has no {', '.join(map(repr, unknown))}; {type(config).__name__} knows "
            f"{', '.join(sorted(_get_fields(config)))}."
        )
    return config


def _get_fields(config) -> dict:
    return dict(config) if isinstance(config, dict) else config.to_dict()


def _is_bitsandbytes(config) -> bool:
    return isinstance(config, BitsAndBytesConfig)
