"""Translate the flags of LLaVA, MoE-LLaVA and transformers 4, on a command line or in a YAML file, into ours."""

import json
import logging
import os

from llava_lite.constants import NO, YES
from llava_lite.hub.yaml_files import read_yaml

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "image_tower": "vision_tower",
    "image_projector_type": "mm_projector_type",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}

# Accepted without effect: what they ask for always happens, or does not exist here.
WITHOUT_EFFECT = {
    "overwrite_output_dir": "a run resumes from the newest complete checkpoint of --output_dir; empty it to restart",
    "fp16_backend": "mixed precision is torch's own",
    "half_precision_backend": "mixed precision is torch's own",
    "fp16_opt_level": "apex is not used",
    "use_mps_device": "an MPS device is used where there is one",
    "use_ipex": "IPEX is part of torch",
    "jit_mode_eval": "evaluation is never traced",
    "mpt_attn_impl": "there is no MPT backbone here; --attn_implementation chooses the attention",
    "lora_weight_path": "LLaVA never read it",
    "include_tokens_per_second": "tokens a second are always logged",
    "tpu_metrics_debug": "see --debug",
    "use_legacy_prediction_loop": "there is one evaluation loop",
}

REFUSED = {
    "adafactor": "use --optim adafactor",
    "torchdynamo": "use --torch_compile_backend",
    "dispatch_batches": "use --accelerator_config '{\"dispatch_batches\": ...}'",
    "split_batches": "use --accelerator_config '{\"split_batches\": ...}'",
    "fsdp_min_num_params": "use --fsdp_config '{\"min_num_params\": ...}'",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config '{\"transformer_layer_cls_to_wrap\": [...]}'",
    "include_inputs_for_metrics": "use --include_for_metrics inputs",
    "push_to_hub_organization": "use --hub_model_id organisation/name",
    "past_index": "transformers 5 has no successor of it",
    "mp_parameters": "transformers 5 has no successor of it",
    "ray_scope": "transformers 5 has no successor of it",
    "tpu_num_cores": "transformers 5 has no successor of it",
    "video_tower": "llava_lite reads images only",
    "video_projector_type": "llava_lite reads images only",
    "video_global_proj": "llava_lite reads images only",
    "video_temproal_proj": "llava_lite reads images only",
    "video_spatial_proj": "llava_lite reads images only",
    "video_folder": "llava_lite reads images only",
    "num_frames": "llava_lite reads images only",
}


def split_flags(argv):
    """Return [(name, values)] of a command line; a first entry named "" holds the words before any flag.

    `--a-b=1` and `--a_b 1` are the same. A value may start with a dash only if it is a number.
    """
    flags = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if has_value else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            flags.append(("", [word]))
    return flags


def join_flags(flags):
    """Return the command line of [(name, values)]."""
    return [word for name, values in flags for word in ([f"--{name}"] if name else []) + values]


def is_true(values):
    """Tell whether a flag's values mean True; no value does."""
    return not values or values[0].lower() in YES


def tensorboard_directory(values):
    """Translate `--logging_dir`: transformers 5 reads TensorBoard's directory from the environment."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
    return []


def warmup_steps(values):
    """Translate `--warmup_ratio r`: transformers 5 reads `--warmup_steps` below 1 as a ratio."""
    # A ratio of 1.0 would be read as one step.
    return [("warmup_steps", [str(min(float(values[0]), 0.999999))])]


def group_by_length(values):
    """Translate `--group_by_length`, a boolean in transformers 4."""
    return [("train_sampling_strategy", ["group_by_length"])] if is_true(values) else []


def save_safetensors(values):
    """Accept `--save_safetensors True`, which is what always happens."""
    if not is_true(values):
        raise ValueError("--save_safetensors False: weights are always saved as safetensors. Drop the flag.")
    return []


def checkpointing(name, known):
    """Return the installed transformers' name for a flag of gradient checkpointing.

    5.23 has `activation_checkpointing` and warns of the old name; 5.17 has only `gradient_checkpointing`.
    """
    preferred = name.replace("gradient", "activation")
    return preferred if preferred in known else name.replace("activation", "gradient")


TRANSLATED = {
    "warmup_ratio": warmup_steps,
    "group_by_length": group_by_length,
    "logging_dir": tensorboard_directory,
    "save_safetensors": save_safetensors,
}


def translate(argv, known):
    """Return the command line `argv` in present flags.

    known: names of all present flags, which are left alone. Raises ValueError for a flag that no longer exists, with
    what to use instead.
    """
    flags = []
    for name, values in split_flags(argv):
        if name in REFUSED and name not in known:
            raise ValueError(f"--{name} is not a flag any more: {REFUSED[name]}.")
        if name in WITHOUT_EFFECT and name not in known:
            logger.info("--%s has no effect: %s.", name, WITHOUT_EFFECT[name])
        elif name in TRANSLATED and name not in known:
            flags += TRANSLATED[name](values)
        elif name.endswith(("gradient_checkpointing", "activation_checkpointing")):
            flags = [flag for flag in flags if flag[0] != "auto_checkpointing"]
            is_auto = values == ["auto"]
            if values and not is_auto and values[0].lower() not in YES + NO:
                raise ValueError(
                    f"--{name} {values[0]}: True for every layer, False for none, or auto for as few as memory makes "
                    "necessary."
                )
            flags.append((checkpointing(name, known), ["False"] if is_auto else values))
            flags += [("auto_checkpointing", ["True"])] if is_auto else []
        elif name.endswith("_checkpointing_kwargs"):
            flags.append((checkpointing(name, known), values))
        else:
            flags.append((RENAMED.get(name, name), values))
    last = dict(flags)
    if all(name in last and is_true(last[name]) for name in ("bf16", "fp16")):
        # Here too, since both are turned off below on a machine that has neither.
        raise ValueError("--bf16 True and --fp16 True contradict each other; drop one.")
    on_cpu = any(name == "use_cpu" and is_true(values) for name, values in flags)
    return join_flags([(name, fit_machine(name, values, on_cpu)) for name, values in flags])


def fit_machine(name, values, on_cpu):
    """Return the values of a flag; a precision that this machine lacks is turned off.

    bf16 stays with `--use_cpu`: a CPU computes in it, slowly.
    """
    if name not in ("bf16", "fp16", "tf32") or not is_true(values) or machine_has(name):
        return values
    if on_cpu and name == "bf16":
        return values
    logger.warning("--%s True: this machine has no device that computes in it; it is turned off.", name)
    return ["False"]


def machine_has(name):
    """Tell whether this machine has a device that computes in `name`: "bf16", "fp16" or "tf32"; or any "device"."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

    has = {
        "bf16": is_torch_bf16_gpu_available,
        "fp16": torch.cuda.is_available,
        "tf32": is_torch_tf32_available,
        "device": torch.accelerator.is_available,
    }
    return has[name]()


def open_yaml(argv):
    """Return a command line in which a YAML file at its beginning is replaced by the flags in it.

    Later flags override them.
    """
    argv = list(argv)
    # The deepspeed launcher puts this before the user's words.
    at = 1 if argv and argv[0].startswith("--local_rank=") else 0
    if not argv[at:] or not argv[at].endswith((".yaml", ".yml")):
        return argv
    return argv[:at] + yaml_flags(argv[at]) + argv[at + 1 :]


def yaml_flags(path):
    """Return the command line of a YAML file of `flag: value` lines; sections are headings only."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines of `flag: value`, got {type(content).__name__}.")
    return list(mapping_flags(content))


def mapping_flags(mapping):
    """Yield the command line of a mapping; a mapping inside it is a section, or a flag whose value is a dict."""
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name of a flag; write lines of `flag: value`.")
        if isinstance(value, dict) and not name.endswith(("_kwargs", "_config", "deepspeed")):
            yield from mapping_flags(value)
        elif isinstance(value, dict):
            yield from (f"--{name}", json.dumps(value, default=str))
        elif value is not None:
            yield from (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
