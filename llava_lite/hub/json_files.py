"""Read the JSON files of a checkpoint, which may be anybody's, within bounds of size, depth and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

# An index of 200,000 weights has 20 MB, a tokenizer.json of 260,000 words 35.
LARGEST_BYTES = 64 * 2**20
# What transformers reads with a tokenizer; Python's own reader ends a deep file in a RecursionError.
BESIDE_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
BESIDE_VOCABULARY += ("processor_config.json",)
# Configs nest five deep; deep copies of a config and Python's recursion end before a thousand.
DEEPEST = 64
# The largest sizes that a config can have, whatever the weights: above those of every published model by ten or more.
# What they make is compared with the weights once these are found; see checkpoints/sizes.py.
LAYERS, EXPERTS, HEADS, WIDTH, ROWS, SIDE = 4_096, 65_536, 65_536, 2**20, 2**27, 2**15
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "mm_query_depth"), LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "mm_query_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "head_dim", "mm_hidden_size"), WIDTH),
    **dict.fromkeys(("projection_dim", "mm_query_hidden", "q_lora_rank", "kv_lora_rank"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "encoder_hidden_size"), 16 * WIDTH),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), ROWS),
    **dict.fromkeys(("image_size", "patch_size", "mm_image_size", "num_channels", "num_query_tokens"), SIDE),
    **dict.fromkeys(("mm_query_len", "adaption_prompt_len"), SIDE),
}
# A dense model says so by 0 of these; 0 places are relative ones.
MAY_BE_ZERO = {"num_experts", "num_local_experts", "n_routed_experts", "max_position_embeddings"}
# Names of implementations; with a slash it is a repository of the Hub with code, which transformers would run.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def read_fields(path) -> dict:
    """Return the fields of a JSON file; ValueError for anything else, and for what is too large or too deep."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__} and no fields. Copy it again, or write it again.")
    return fields


def read_json(path):
    """Return what a JSON file holds; ValueError with the reason for a file that is none, too large or too deep."""
    check_bytes(path, LARGEST_BYTES)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        is_too_deep = is_deeper(found, DEEPEST)
    except RecursionError:
        is_too_deep = True
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Copy it again, or write it again.") from error
    if is_too_deep:
        raise too_deep(path)
    return found


def check_json(path) -> None:
    """Raise ValueError for a JSON file of another reader that is too large or too deep; what is none is left to it."""
    check_bytes(path, LARGEST_BYTES)
    try:
        is_too_deep = is_deeper(json.loads(Path(path).read_bytes()), DEEPEST)
    except RecursionError:
        is_too_deep = True
    except ValueError:
        return
    if is_too_deep:
        raise too_deep(path)


def check_json_of_tokenizer(find: Callable[[str], str | None]) -> None:
    """Raise ValueError for a JSON file that transformers reads with a tokenizer and that is too large or too deep.

    find: name -> the local path of a file, None without one.
    """
    for name in BESIDE_VOCABULARY:
        if (path := find(name)) is not None:
            read_fields(path)
    if (path := find("tokenizer.json") or find("vocab.json")) is not None:
        # What else is wrong with it is found when it is opened.
        check_json(path)


def too_deep(path) -> ValueError:
    """Return the error for a file that is nested too deeply."""
    return ValueError(
        f"{path} nests lists and fields more than {DEEPEST} deep; no file of a checkpoint does. Take another one."
    )


def check_bytes(path, largest: int) -> None:
    """Raise ValueError for a file that is too large to be what its name says."""
    num_bytes = Path(path).stat().st_size
    if num_bytes > largest:
        raise ValueError(
            f"{path} has {num_bytes:,} bytes, and such a file has at most {largest:,}. Copy it again, or take another."
        )


def is_deeper(value, levels: int) -> bool:
    """Tell whether lists and dicts are nested more than `levels` deep."""
    layer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        layer = [
            one
            for outer in layer
            for one in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(one, (dict, list))
        ]
        if not layer:
            return False
    return True


def check_config(path, fields: dict) -> None:
    """Raise ValueError for a config whose sizes cannot be those of a model, or that names code of the Hub.

    path: of the file or checkpoint, for the message. Parts, such as vision_config, are checked like the config itself.
    """
    parts = [("", fields)]
    while parts:
        place, part = parts.pop()
        for key, value in part.items():
            name = f"{place}{key}"
            if isinstance(value, dict):
                parts.append((f"{name}.", value))
            if key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS and "/" in str(value):
                raise ValueError(
                    f"{path}: {name} is {value!r}, code of a repository of the Hub, which is never run here. Remove "
                    "the field, and ask for an implementation by name (attn_implementation=...)."
                )
            if key in LARGEST and value is not None:
                for size in value if isinstance(value, list) else [value]:
                    check_size(path, name, size, LARGEST[key], least=key not in MAY_BE_ZERO)


def check_size(path, name: str, size, largest: int, least: int = 1) -> None:
    """Raise ValueError unless a size is a whole number from `least` to `largest`."""
    if not isinstance(size, int) or isinstance(size, bool) or not least <= size <= largest:
        shown = repr(size) if len(repr(size)) < 40 else f"{repr(size)[:30]}..."
        raise ValueError(
            f"{path}: {name} is {shown}; expected a whole number from {int(least)} to {largest:,}. It is no config "
            "of a model; copy it again, or take another."
        )
