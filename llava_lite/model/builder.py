"""Open a checkpoint by folder or hub id as (tokenizer, model, image_processor, context_len), LLaVA's way.

The class comes from config.json and never from the name; LLaVA's `model_name` is accepted and not read.
"""

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from llava_lite.companions import find_base, image_processor_of, load_tokenizer, read_json
from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava_lite.end_marks import add_end_mark, end_mark_of_config
from llava_lite.formats import foreign_format, moe_llava
from llava_lite.hub import everywhere, hub_arguments, in_words, reach_config, require_config
from llava_lite.model import BACKBONES, model_class_for
from llava_lite.model.accounting import own_accounting, strays
from llava_lite.model.architectures import check_generates, check_model_type
from llava_lite.model.checkpoint_weights import refuse_nameless
from llava_lite.model.loading import generation_arguments
from llava_lite.model.partial import base_of, merge_adapter, refuse_lost_parts, refuse_strays
from llava_lite.model.placement import SPREADS, is_too_large, spread, take_places
from llava_lite.model.quantization import agreed, one_request, stored_quantization
from llava_lite.model.vocabulary import fit_rows
from llava_lite.model.weight_files import broken_files_in_words
from llava_lite.model_source import check_source

logger = logging.getLogger(__name__)

# LLaVA's answer where a config does not say how long a prompt may be.
DEFAULT_CONTEXT_LEN = 2048


def load_pretrained_model(
    model_path,
    model_base=None,
    model_name=None,
    load_8bit=False,
    load_4bit=False,
    device_map="auto",
    device="cuda",
    use_flash_attn=False,
    dtype=None,
    torch_dtype=None,
    attn_implementation=None,
    customized_config=None,
    overwrite_config=None,
    multimodal=None,
    **kwargs,
):
    """Return (tokenizer, model, image_processor, context_len); image_processor is None for a plain LLM.

    model_path: a whole model, or a folder of what was trained (projector, LoRA); such a folder names its base in
    config.json, and model_base replaces that name. dtype: None for the checkpoint's own (float32 for a float16 one on
    the CPU). device_map: a map of several places, or "auto" on several GPUs, spreads the model and needs accelerate;
    otherwise the model goes to `device` itself. customized_config: a config, its fields or where to read it, in place
    of the checkpoint's; overwrite_config: fields to replace, those within `moe` one by one. model_name, multimodal:
    LLaVA's and lmms-eval's, accepted and not needed. Further keywords go to `from_pretrained`.

    Experts lose no token and answer the same every time. MoE-LLaVA drops tokens above a capacity and draws the second
    expert, at inference too: overwrite_config={"moe": {"moe_drop_tokens": True, "moe_second_expert_sampling":
    "always", "moe_count_padding": True}} asks for that.
    """
    hub = hub_arguments(kwargs)
    asked = one_request(load_8bit, load_4bit, kwargs.pop("quantization_config", None))
    with in_words(model_path, **hub):
        base = base_named(model_path, model_base, hub)
        config = read_config(model_path, base, customized_config, overwrite_config, hub)
        stored = stored_quantization(model_path, base, hub)
    quantization = agreed(base or model_path, stored, asked)
    is_quantised = stored is not None or asked is not None
    has_limits = any(kwargs.get(name) is not None for name in ("max_memory", "offload_folder"))
    device, device_map = placement(device, device_map, quantised=is_quantised, has_limits=has_limits)
    # On the CPU half precision is slow and, in some kernels, absent.
    widens = device.type == "cpu" and dtype is None and torch_dtype is None
    if widens and is_quantised and getattr(config, "dtype", None) == torch.float16:
        # Cast while loading: a quantised model is not cast later.
        dtype = torch.float32
    arguments = {
        "dtype": _as_dtype(dtype if dtype is not None else torch_dtype),
        "attn_implementation": "flash_attention_2" if use_flash_attn else attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization,
        **kwargs,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    # Before the weights: what is missing for it is told before they are fetched.
    tokenizer = load_tokenizer(model_path, base, **hub)
    with in_words(model_path, **hub):
        model = _load_model(model_path, base, config, arguments, hub)
    if device_map is None and is_too_large(model, device) and _is_installed("accelerate"):
        logger.warning("the model has more weights than %s has free memory; what is over stays on the CPU.", device)
        model = spread(model, "auto")
    elif device_map is None:
        model = model.to(device, dtype=torch.float32 if widens and model.dtype == torch.float16 else None)
    add_image_tokens(model, tokenizer)
    if moe_llava.claims(read_json(model_path, "config.json", hub)):
        # Its config.json may name another end than the tokenizer, whose end it was trained with.
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    if getattr(model.config, "conv_template", None) is not None:
        add_end_mark(model.generation_config, end_mark_of_config(model.config, tokenizer), tokenizer)
    return tokenizer, model.eval(), image_processor_of(model_path, model.config, **hub), context_len(model.config)


def base_named(model_path, model_base, hub):
    """Return the base that a checkpoint stands on: the one given, else the one it names; None for a whole model."""
    if isinstance(model_path, (str, Path)):
        check_source(model_path, **hub)
        _check_folder(model_path)
        reach_config(model_path, hub)
    named = read_json(model_path, "config.json", hub).get("base_model_name_or_path")
    base = model_base or base_of(model_path, named, hub)
    base = base and find_base(str(base), model_path)
    if base is not None:
        check_source(base, "base", **everywhere(hub))
    return base


def read_config(model_path, base, customized_config, overwrite_config, hub):
    """Return the config of a checkpoint, with the base it stands on and the caller's changes."""
    has_config = _has_file(model_path, "config.json", hub)
    if base is None and customized_config is None:
        require_config(model_path, hub)
    source = customized_config or (model_path if has_config else base)
    if isinstance(source, dict):
        overwrite_config, source = {**source, **(overwrite_config or {})}, model_path if has_config else base
    config = config_of(source, hub) if isinstance(source, (str, Path)) else source
    for key, value in (overwrite_config or {}).items():
        old = getattr(config, key, None)
        setattr(config, key, {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value)
    if is_llava(config) and has_config:
        config.base_model_name_or_path = base
    return config


def config_of(name, hub):
    """Return the config of a checkpoint, one of ours where its config.json is of a format that we read.

    Not by AutoConfig alone: a LLaVA v1 and transformers' own LLaVA both say model_type "llava".
    """
    fields = read_json(name, "config.json", hub)
    foreign = foreign_format(fields)
    if foreign is None:
        found = str(fields.get("model_type"))
        if found.startswith(("llava", "moe_llava")) and found not in CONFIG_MAPPING:
            # transformers would say to update it.
            raise ValueError(
                f"{str(name)!r} is a LLaVA on a decoder that is not known here (model_type {found!r}); "
                f"known: {', '.join(sorted(BACKBONES))}, and what other systems call these."
            )
        check_model_type(name, fields)
        return AutoConfig.from_pretrained(name, **hub)
    fields = foreign.config_from(fields)
    config = model_class_for(fields["model_type"]).config_class.from_dict(fields)
    config._name_or_path = str(name)
    return config


def is_llava(config):
    """Tell whether a config is one of this package's models, with or without a vision tower."""
    return hasattr(config, "has_vision_tower")


def _load_model(model_path, base, config, arguments, hub):
    """Load the model that a config names; LoRA without a LLaVA config.json beside it is folded into its base."""
    if is_llava(config) and (base is None or _has_file(model_path, "config.json", hub)):
        # By class: transformers' Auto class would open the base that a LoRA folder names and forget the folder.
        return model_class_for(config.model_type).from_pretrained(model_path, config=config, **arguments)
    if base is None:
        check_generates(model_path, config)
        if arguments.get("attn_implementation") == "auto":
            # What is best for a decoder of transformers' own, transformers knows; some have no sdpa.
            del arguments["attn_implementation"]
        return open_plain(model_path, config, arguments, hub)
    refuse_lost_parts(model_path, hub)
    arguments = {name: value for name, value in arguments.items() if name not in hub} | everywhere(hub)
    places = take_places(arguments)
    model = merge_adapter(_load_model(base, None, config, arguments, everywhere(hub)), model_path, hub)
    return spread(model, **places) if places else model


def open_plain(path, config, arguments, hub):
    """Return a plain language model, every weight accounted for; transformers only warns of those that are missing."""
    arguments = arguments | generation_arguments(path, config, hub, arguments)
    with own_accounting(), broken_files_in_words(path, hub):
        model, info = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **arguments)
    refuse_strays(path, type(model).__name__, *strays(info))
    return model


def placement(device, device_map, quantised=False, has_limits=False):
    """Return (device, device_map) for loading: a device and None where the model can be moved there whole.

    A map of one place is that place. "auto" and its kin spread a model over several GPUs where there are several
    and accelerate is installed, and over whatever there is if the caller limits memory (has_limits). A quantised model
    cannot be moved afterwards and gets a map.
    """
    if isinstance(device_map, dict) and "disk" in device_map.values() and set(device_map.values()) <= {"cpu", "disk"}:
        return torch.device("cpu"), device_map
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device, device_map = device_map[""], None
    elif isinstance(device_map, (int, torch.device)) or (isinstance(device_map, str) and _is_device(device_map)):
        device, device_map = device_map, None
    elif isinstance(device_map, str) and device_map not in SPREADS:
        raise ValueError(
            f"device_map is {device_map!r}; known: {', '.join(SPREADS)}, a device such as 'cuda:0', a dict of places."
        )
    device = "cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.warning("no CUDA device is available; the model goes to the CPU (device='cpu' says so at once).")
        device, device_map = torch.device("cpu"), device_map if has_limits else None
    has_several = device == torch.device("cuda") and torch.cuda.device_count() > 1
    if isinstance(device_map, str) and not (has_limits or (has_several and _is_installed("accelerate"))):
        device_map = None
    if device_map is None and quantised:
        device_map = {"": device}
    return device, device_map


def add_image_tokens(model, tokenizer):
    """Give the tokenizer the picture tokens that the config trains with, and the model rows for them."""
    tokens = []
    if getattr(model.config, "mm_use_im_patch_token", False):
        tokens.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if tokens and tokenizer.add_tokens(tokens, special_tokens=True):
        logger.info("added %s to the tokenizer, as the config asks.", ", ".join(tokens))
    # Never shrink: many vocabularies are padded to a round number of rows.
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= num_rows:
        return
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {num_rows} rows, and rows cannot be added to "
            "weights that are offloaded. Open the model without a device map once, save it, and open what was saved."
        )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fit_rows(model, len(tokenizer), num_rows, seed=0)


def context_len(config):
    """Return how many tokens a prompt and its answer may have together."""
    named = (getattr(config, key, None) for key in ("max_sequence_length", "tokenizer_model_max_length"))
    return next((length for length in named if length is not None), DEFAULT_CONTEXT_LEN)


def _check_folder(name):
    """Raise OSError for a directory that lacks what makes it a checkpoint, with what it lacks; a hub id passes."""
    path = Path(name)
    if not path.is_dir() or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return
    refuse_nameless(path)
    steps = [step.parent for step in path.glob("checkpoint-*/config.json") if step.parent.name[11:].isdigit()]
    newest = max(steps, key=lambda step: int(step.name[11:]), default=None)
    hint = "" if newest is None else f"; a checkpoint of it is {str(newest)!r}"
    raise OSError(f"{str(path)!r} is no checkpoint: it has no config.json{hint}.")


def _has_file(name, file, hub):
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) is not None


def _as_dtype(dtype):
    """Return a torch dtype or "auto" of what callers write: torch.float16, "float16", "auto", None."""
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; write float32, bfloat16, float16 or auto.")
    return named


def _is_device(name):
    """Tell a device ("cpu", "cuda:1") from a strategy ("auto", "balanced")."""
    return name.split(":")[0] in ("cpu", "cuda", "mps", "xpu", "npu", "meta")


def _is_installed(name):
    return importlib.util.find_spec(name) is not None
