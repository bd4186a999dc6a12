"""Open a checkpoint by directory or hub id as (tokenizer, model, image_processor, context_len), LLaVA's way.

The class comes from config.json and never from the name; LLaVA's `model_name` is accepted and not read.
"""

import copy
import importlib.util
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llava_lite.checkpoints.config import check_generates, is_llava
from llava_lite.checkpoints.files import check_before_opening, read_shapes, readable_file_errors
from llava_lite.checkpoints.load_report import missing_and_unexpected, own_accounting
from llava_lite.checkpoints.partial import check_no_missing_or_unexpected, check_parts_found, merge_adapter
from llava_lite.checkpoints.sizes import check_sizes
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import check_has_config, name_newest, verify_texts
from llava_lite.checkpoints.tokenizer import check_vocabulary_of_base, get_image_processor, load_tokenizer
from llava_lite.checkpoints.torch_files import is_torch_checkpoint
from llava_lite.checkpoints.vocabulary import fit_rows
from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava_lite.conversation.end_tokens import add_end_token, get_config_end_token
from llava_lite.formats import moe_llava
from llava_lite.hub.errors import CONFIG
from llava_lite.model import model_class_for
from llava_lite.model.generation_config import read_generation_config
from llava_lite.model.placement import SPREADS, is_too_large, pop_placement, spread
from llava_lite.model.quantization import agreed, one_request, stored_quantization

logger = logging.getLogger(__name__)

# LLaVA's value if a config does not limit the length of a prompt.
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

    model_path: a complete model, or a directory of trained weights (projector, LoRA), which names its base in
    config.json; model_base replaces that name. dtype: None for the checkpoint's own (float32 for a float16 one on the
    CPU). device_map: a map of several places, or "auto" on several GPUs, spreads the model and needs accelerate;
    otherwise the model goes to `device` itself. customized_config: a config, its fields or where to read it, in place
    of the checkpoint's; overwrite_config: fields to replace, those within `moe` one by one. model_name, multimodal:
    LLaVA's and lmms-eval's, accepted and not needed. Further keywords go to `from_pretrained`.

    No expert drops tokens, and routing is deterministic. MoE-LLaVA drops tokens above a capacity and samples the
    second expert, at inference too: overwrite_config={"moe": {"moe_drop_tokens": True, "moe_second_expert_sampling":
    "always", "moe_count_padding": True}} asks for that.
    """
    if is_torch_checkpoint(model_path):
        return load_torch_checkpoint(
            model_path, model_base, device, as_dtype(dtype if dtype is not None else torch_dtype), **kwargs
        )
    checkpoint = Checkpoint.open(model_path, kwargs, base=model_base)
    asked = one_request(load_8bit, load_4bit, kwargs.pop("quantization_config", None))
    checkpoint.check()
    verify_texts(checkpoint.path)
    check_holds_model(checkpoint.path)
    base = checkpoint.base
    config = customise_config(checkpoint, customized_config, overwrite_config)
    stored = stored_quantization(checkpoint)
    quantization = agreed(base or checkpoint, stored, asked)
    is_quantised = stored is not None or asked is not None
    has_limits = any(kwargs.get(name) is not None for name in ("max_memory", "offload_folder"))
    device, device_map = placement(device, device_map, quantised=is_quantised, has_limits=has_limits)
    # On the CPU half precision is slow and, in some kernels, absent.
    widens = device.type == "cpu" and dtype is None and torch_dtype is None
    if widens and is_quantised and getattr(config, "dtype", None) == torch.float16:
        # Cast while loading: a quantised model is not cast later.
        dtype = torch.float32
    arguments = {
        "dtype": as_dtype(dtype if dtype is not None else torch_dtype),
        "attn_implementation": "flash_attention_2" if use_flash_attn else attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization,
        **kwargs,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    # Before the weights: a missing package or file is reported before they are fetched.
    tokenizer = load_tokenizer(checkpoint)
    check_vocabulary_of_base(checkpoint, tokenizer)
    with checkpoint.readable_errors():
        model = _load_model(checkpoint, base, config, arguments)
    if device_map is None and is_too_large(model, device) and _is_installed("accelerate"):
        logger.warning("the model has more weights than %s has free memory; the rest stays on the CPU.", device)
        model = spread(model, "auto")
    elif device_map is None:
        model = model.to(device, dtype=torch.float32 if widens and model.dtype == torch.float16 else None)
    add_image_tokens(model, tokenizer)
    if checkpoint.format is moe_llava:
        # Its config.json may name another end token than the tokenizer, whose end token it was trained with.
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    if getattr(model.config, "conv_template", None) is not None:
        add_end_token(model.generation_config, get_config_end_token(model.config, tokenizer), tokenizer)
    return tokenizer, model.eval(), get_image_processor(checkpoint, model.config), context_len(model.config)


def load_torch_checkpoint(path, base, device, dtype, **kwargs):
    """Return what load_pretrained_model does, for a file or directory of another system; see model/originals.py.

    kwargs: of load_original; in few bits, or on several devices, such a checkpoint is opened once it is converted.
    """
    from llava_lite.model.originals import load_original

    known = ("vision_tower", "tokenizer", "attn_implementation", "mm_query_heads", "image_channels", "vision_config")
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} cannot be given for {str(path)!r}, which another system wrote; known: "
            f"{', '.join(known)}. Convert it first: llava-lite convert {path} DIRECTORY --base BASE."
        )
    place = torch.device(device if device is not None and torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = torch.float32 if place.type == "cpu" else None
    tokenizer, model, image_processor = load_original(path, base, dtype=dtype, **kwargs)
    return tokenizer, model.to(place), image_processor, context_len(model.config)


def customise_config(checkpoint, customized_config=None, overwrite_config=None):
    """Return a copy of a checkpoint's config, with the base it stands on and the caller's changes."""
    base, has_config = checkpoint.base, checkpoint.file(CONFIG) is not None
    source = checkpoint if has_config or base is None else base
    if isinstance(customized_config, dict):
        overwrite_config = {**customized_config, **(overwrite_config or {})}
    elif isinstance(customized_config, (str, Path)):
        source = Checkpoint(customized_config, **checkpoint.keywords)
    elif customized_config is not None:
        source = None
    config = customized_config if source is None else copy.deepcopy(source.config)
    for key, value in (overwrite_config or {}).items():
        old = getattr(config, key, None)
        setattr(config, key, {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value)
    if is_llava(config) and has_config:
        config.base_model_name_or_path = None if base is None else base.path
    return config


def _load_model(checkpoint, base, config, arguments):
    """Load the model that a config names; LoRA without a LLaVA config.json beside it is merged into its base."""
    if is_llava(config) and (base is None or checkpoint.file(CONFIG) is not None):
        # By class: transformers' Auto class would open the base that a LoRA directory names and forget the directory.
        return model_class_for(config.model_type).from_pretrained(checkpoint, config=config, **arguments)
    if base is None:
        check_generates(checkpoint, config)
        if arguments.get("attn_implementation") == "auto":
            # transformers knows what is best for its own decoders; some have no sdpa.
            del arguments["attn_implementation"]
        return open_plain(checkpoint, config, arguments)
    check_parts_found(checkpoint)
    places = pop_placement(arguments)
    model = merge_adapter(_load_model(base, None, config, arguments), checkpoint)
    return spread(model, **places) if places else model


def open_plain(checkpoint, config, arguments):
    """Return a plain language model, every weight accounted for; transformers only warns of missing ones."""
    check_sizes(checkpoint, config, read_shapes(checkpoint))
    check_before_opening(checkpoint)
    arguments |= {"trust_remote_code": False}
    generation = arguments.get("generation_config")
    if generation is None:
        generation = arguments["generation_config"] = read_generation_config(checkpoint, config)
    with own_accounting(), readable_file_errors(checkpoint):
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            output_loading_info=True,
            **checkpoint.keywords,
            **arguments,
        )
    model.generation_config = generation
    check_no_missing_or_unexpected(checkpoint, type(model).__name__, *missing_and_unexpected(info))
    return model


def placement(device, device_map, quantised=False, has_limits=False):
    """Return (device, device_map) for loading: a device and None if the complete model can be moved there.

    A map of one place is that place. "auto", "balanced" and the like spread a model over several GPUs if accelerate is
    installed, and over all devices if the caller limits memory (has_limits). A quantised model cannot be moved
    afterwards and gets a map.
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
        logger.warning("no CUDA device is available; the model goes to the CPU (device='cpu' avoids this warning).")
        device, device_map = torch.device("cpu"), device_map if has_limits else None
    has_several = device == torch.device("cuda") and torch.cuda.device_count() > 1
    if isinstance(device_map, str) and not (has_limits or (has_several and _is_installed("accelerate"))):
        device_map = None
    if device_map is None and quantised:
        device_map = {"": device}
    return device, device_map


def add_image_tokens(model, tokenizer):
    """Give the tokenizer the image tokens that the config asks for, and the model vocabulary rows for them."""
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
            f"the tokenizer has {len(tokenizer)} tokens and the model {num_rows} vocabulary rows, which cannot be "
            "added to offloaded weights. Open the model without a device map once, save it, and open the "
            "saved directory."
        )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fit_rows(model, len(tokenizer), num_rows, seed=0)


def context_len(config):
    """Return how many tokens a prompt and its answer may have together."""
    named = (getattr(config, key, None) for key in ("max_sequence_length", "tokenizer_model_max_length"))
    return next((length for length in named if length is not None), DEFAULT_CONTEXT_LEN)


def check_holds_model(name):
    """Raise OSError for a directory without config.json and adapter_config.json; a hub id passes."""
    path = Path(name)
    if not path.is_dir() or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return
    check_has_config(path)
    raise OSError(f"{str(path)!r} is no checkpoint: it has no config.json{name_newest(path)}.")


def as_dtype(dtype):
    """Return a torch dtype or "auto" for torch.float16, "float16", "auto" or None."""
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
