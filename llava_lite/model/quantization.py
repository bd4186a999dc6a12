"""Turn what a caller says of 4 and 8 bits, and what a checkpoint holds, into one quantization config, or refuse.

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

from llava_lite.companions import find_base, read_json
from llava_lite.hub import everywhere
from llava_lite.model.partial import base_of

logger = logging.getLogger(__name__)

# What stays in its own dtype unless the caller names other modules. Experts and router are no nn.Linear, which is all
# that bitsandbytes replaces. transformers compares with the start and the end of a module's full name: "mm_projector"
# alone would not spare model.mm_projector.0.
KEPT_WHOLE = ["lm_head", "model.mm_projector", "model.vision_tower", "coefficient", "experts"]
# The attribute that names these modules, in the configs of transformers' methods.
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
KEY = "quantization_config"
# What bitsandbytes saves beside a weight of 4 bits and of 8.
TABLES = re.compile(r"\.(weight\.absmax|SCB)$")
METHOD = "bitsandbytes"


def quantisation(load_8bit: bool, load_4bit: bool) -> BitsAndBytesConfig | None:
    """Return the config of LLaVA's two switches or None; KEPT_WHOLE says what stays as it is."""
    if not load_8bit and not load_4bit:
        return None
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; choose one.")
    need_bitsandbytes(f"load_{'8' if load_8bit else '4'}bit=True")
    return bits_config(8 if load_8bit else 4)


def bits_config(bits: int, **choices) -> BitsAndBytesConfig:
    """Return LLaVA's config of 4 or 8 bits; choices: keywords of BitsAndBytesConfig that replace its own."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_WHOLE))
    usual = {
        "bnb_4bit_compute_dtype": torch.float16,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
    }
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(KEPT_WHOLE), **usual | choices)


def one_request(load_8bit: bool, load_4bit: bool, given):
    """Return the config that a caller asks for by LLaVA's switches or by quantization_config; None for neither."""
    switched = quantisation(load_8bit, load_4bit)
    if switched is not None and given is not None:
        raise ValueError(
            f"load_{'8' if load_8bit else '4'}bit=True and quantization_config both say how to quantise; give one."
        )
    return switched if given is None else with_kept_modules(given)


def refuse_old_switches(arguments: dict) -> None:
    """Raise ValueError for the keywords of transformers 4, which 5 would hand to the model's constructor."""
    found = [name for name in ("load_in_4bit", "load_in_8bit") if name in arguments]
    if found:
        raise ValueError(
            f"{found[0]} is no keyword of from_pretrained since transformers 5. Give quantization_config="
            f"BitsAndBytesConfig({found[0]}=True), or {found[0].replace('_in', '')}=True to llava_lite.load."
        )


def with_kept_modules(given):
    """Return a copy of a quantization config (or its dict) in which tower, connector, head and experts are spared.

    Modules that the caller names, an empty list too, replace these. Raises ValueError for what is no such config.
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
            raise ValueError("quantization_config names bitsandbytes and no bits; say load_in_4bit or load_in_8bit.")
        need_bitsandbytes("quantization_config")
    for name in SKIPPED:
        if hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(KEPT_WHOLE))
    return config


def stored_quantization(path, base, hub: dict) -> dict | None:
    """Return the quantization_config of the weights of a directory or hub id, None for weights in full precision.

    base: what the directory stands on, if it holds only what was trained: its base's weights count, and not how they
    were held while it was trained.
    """
    while base is not None:
        base, hub = find_base(str(base), path), everywhere(hub)
        path = base
        base = base_of(path, read_json(path, "config.json", hub).get("base_model_name_or_path"), hub)
    return read_json(path, "config.json", hub).get(KEY)


def take_stored(config, absent: list[str], *replacement) -> dict | None:
    """Return what a model's config says of the bits of its weights, None for full precision; a null goes.

    absent: modules that the checkpoint does not hold; they are noted as being in full precision. replacement: what
    the config is to say instead.
    """
    stored = replacement[0] if replacement else getattr(config, KEY, None)
    if hasattr(config, KEY):
        # transformers asks whether it is there, not what it is.
        delattr(config, KEY)
    if stored is not None:
        config.quantization_config = stored = sparing(_fields_of(stored), absent)
    return stored


def stored_in_names(stored: dict, names) -> dict:
    """Return the fields of a quantization_config with its modules left alone named as in `names`, those of weights.

    For weights that were renamed: bitsandbytes stores tables beside each weight in few bits, and all others are whole.
    """
    if bits_of(stored) is None:
        return stored
    tables = (TABLES.search(name) for name in names)
    in_bits = {match.string[: match.start()] for match in tables if match is not None}
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return stored | {SKIPPED[0]: sorted(modules - in_bits)}


def sparing(config, names: list[str]):
    """Return a quantization config, or its fields, that leaves these modules alone too; None for None."""
    if config is None or not names:
        return config
    fields = _fields_of(config)
    key = next((key for key in SKIPPED if key in fields), None)
    if key is None:
        return config
    # Where nothing is named transformers leaves the head alone.
    spared = [*(["lm_head"] if fields[key] is None else fields[key]), *names]
    if isinstance(config, dict):
        return fields | {key: spared}
    config = copy.deepcopy(config)
    setattr(config, key, spared)
    return config


def agreed(path, stored, asked):
    """Return the config to quantise with while loading: what was asked for, None where the weights are so already.

    stored: of config.json, or None. Raises ValueError if they contradict each other, since weights in few bits are
    not brought to other bits.
    """
    if bits_of(stored) is not None:
        need_bitsandbytes(f"{str(path)!r} holds {kind_of(stored)} weights, and reading them")
    if stored is None or asked is None:
        return asked
    if kind_of(stored) != kind_of(asked):
        raise ValueError(
            f"{str(path)!r} holds {kind_of(stored)} weights, and {kind_of(asked)} were asked for. Leave the request "
            "out to open them as they are, or quantise the weights in full precision."
        )
    stored, asked = _fields_of(stored), _fields_of(asked)
    names = [name for name in asked if name in stored and name not in SKIPPED]
    others = [f"{name} {asked[name]!r}" for name in names if asked[name] != stored[name]]
    if others:
        logger.warning(
            "%r holds %s weights, which stay as they are: not %s.", path, kind_of(stored), ", ".join(others)
        )
    return None


def kind_of(config) -> str:
    """Return what a quantization config makes of weights, as in "4-bit"."""
    fields = _fields_of(config)
    for bits in (4, 8):
        if fields.get(f"load_in_{bits}bit"):
            return f"{bits}-bit"
    method, bits = fields.get("quant_method"), fields.get("bits")
    return f"{getattr(method, 'value', method)}{f' {bits}-bit' if bits else ''}"


def bits_of(config) -> int | None:
    """Return 4 or 8 for a config of bitsandbytes, None for any other and for none."""
    fields = {} if config is None else _fields_of(config)
    return next((bits for bits in (4, 8) if fields.get(f"load_in_{bits}bit")), None)


def need_bitsandbytes(what: str) -> None:
    """Raise ImportError with what to install, if bitsandbytes is missing. what: what needs it."""
    if importlib.util.find_spec(METHOD) is None:
        raise ImportError(f"{what} needs {METHOD}: pip install 'llava-lite[quant]'.")


def _from_fields(fields: dict):
    """Return the config of a dict, as transformers reads it from config.json; ValueError for a name it ignores."""
    try:
        config = AutoQuantizationConfig.from_dict(dict(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization_config {fields!r} is none that transformers knows: {error}") from error
    unknown = [name for name in fields if name not in _fields_of(config) and not hasattr(config, name)]
    if unknown:
        raise ValueError(
            f"quantization_config has no {', '.join(map(repr, unknown))}; {type(config).__name__} knows "
            f"{', '.join(sorted(_fields_of(config)))}."
        )
    return config


def _fields_of(config) -> dict:
    return dict(config) if isinstance(config, dict) else config.to_dict()


def _is_bitsandbytes(config) -> bool:
    return isinstance(config, BitsAndBytesConfig)
