"""Put trained weights (connector, rows of new tokens, LoRA) into the base model that they were trained on.

In every function `checkpoint` is a `source.Checkpoint`, a directory or repository of trained weights.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from llava_lite.checkpoints.copying import copy_weights, gathered, is_partitioned, load_into, read_weights
from llava_lite.checkpoints.files import ADAPTER, ADAPTER_WEIGHTS, COMPLETE, PROJECTOR, TRAINED
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import get_step_adapter, holds_step, step_weights, verify_model
from llava_lite.checkpoints.vocabulary import EMBEDDING, HEAD, fill_rows, fit_rows, is_row_name, load_saved_rows
from llava_lite.formats import foreign_format, llava

logger = logging.getLogger(__name__)

TABLES = (EMBEDDING, HEAD)
IMAGE_PARTS = re.compile(r"\.(vision_tower|mm_projector)\.")


def apply_trained(model, checkpoint, num_rows: int):
    """Return the model with the trained weights of a partial checkpoint, LoRA merged, and the names of those weights.

    num_rows: vocab_size of the directory's config. Raises ValueError with the names of weights that do not fit.
    """
    if holds_step(checkpoint.path):
        return apply_step(model, checkpoint, num_rows)
    files = [file for name in TRAINED if (file := checkpoint.file(name)) is not None]
    has_adapter = checkpoint.file(ADAPTER) is not None
    if not has_adapter:
        check_adapter_found(checkpoint)
    if not files and not has_adapter:
        is_complete = any(map(checkpoint.has, COMPLETE))
        raise OSError(
            f"{checkpoint.path!r} holds nothing to put on a base: none of {', '.join((*TRAINED, ADAPTER))}. "
            + ("It is a complete model: open it without a base." if is_complete else "Copy it again.")
        )
    weights, fields = {}, checkpoint.fields
    for file in reversed(files):
        weights |= read_trained(file, fields)
    where, filled = f"weights of {(files or [checkpoint.path])[0]!r}", set(weights)
    load_with_rows(model, weights, fields, num_rows, where)
    return merge_adapter(model, checkpoint) if has_adapter else model, filled


def apply_step(model, checkpoint, num_rows: int):
    """Return the model with the trained weights of a checkpoint-N, LoRA merged, and the names of those weights."""
    verify_model(checkpoint.path)
    weights, adapter = step_weights(checkpoint.path)
    projector = checkpoint.file(PROJECTOR)
    # The connector is there too if it did not train: it may have come from a file of its own.
    frozen = {} if projector is None else read_trained(projector, {})
    weights = frozen | dict(weights)
    load_with_rows(model, weights, checkpoint.fields, num_rows, f"weights of {checkpoint.path!r}")
    if not adapter:
        return model, set(weights)
    with get_step_adapter(checkpoint.path, adapter) as directory:
        return merge_adapter(model, Checkpoint(directory)), set(weights)


def load_with_rows(model, weights: dict[str, torch.Tensor], fields: dict, num_rows: int, where: str) -> None:
    """Copy trained weights into the model, rows of new tokens into their matrices. fields: config.json beside them."""
    if any(is_row_name(name) for name in weights):
        fit_rows(model, num_rows, model.config.vocab_size)
        weights = load_saved_rows(model, weights, fields.get("new_words"), where)
    load_trained(model, apply_new_rows(model, weights, num_rows), where)


def check_adapter_found(checkpoint) -> None:
    """Raise OSError if there are weights of an adapter and no adapter_config.json."""
    lost = [name for name in ADAPTER_WEIGHTS if checkpoint.has(name)]
    if lost:
        raise OSError(
            f"{checkpoint.path!r} holds {lost[0]} and no {ADAPTER}, which names their layers and their scale. "
            "Copy it beside them."
        )


def check_parts_found(checkpoint) -> None:
    """Raise OSError if trained weights stand beside an adapter without a config.json."""
    lost = [name for name in TRAINED if checkpoint.has(name)]
    if lost:
        raise OSError(
            f"{checkpoint.path!r} holds {', '.join(lost)} and no config.json, which names the model of the weights. "
            "Copy it beside them."
        )


def read_trained(file: str, fields: dict) -> dict:
    """Return the weights of a file of trained weights under our names; fields: the raw config.json beside it."""
    weights = llava.weights_from(read_weights(file), fields)
    foreign = foreign_format(fields)
    return weights if foreign is None else foreign.weights_from(weights, fields)


def apply_new_rows(model, weights: dict[str, torch.Tensor], num_rows: int) -> dict[str, torch.Tensor]:
    """Fit the vocabulary to weights of another vocabulary size than the base's; return the weights left to load.

    num_rows: vocab_size of the config beside the weights. LLaVA writes the full embedding, or only the rows of
    <im_start> and <im_end>, which are its last ones; those, and the same rows of the head, are copied here.
    """
    # From the config: a weight that ZeRO-3 has partitioned has no rows to count.
    num_old, embedding = model.config.vocab_size, weights.get(EMBEDDING)
    num_given = 0 if embedding is None else embedding.shape[0]
    is_rows_alone = 0 < num_given <= 2 < num_old
    if is_rows_alone and num_rows <= num_old:
        # That config was written before the tokens were added: they follow the base's.
        num_rows = num_old + num_given
    elif embedding is not None and not is_rows_alone:
        num_rows = num_given
        if num_rows < num_old:
            # LLaVA removes the padding rows of a vocabulary.
            model.resize_token_embeddings(num_rows)
    fit_rows(model, num_rows, num_old)
    if not is_rows_alone:
        return weights
    ids = list(range(num_rows - len(embedding), num_rows))
    alone = {name for name in TABLES if name in weights and len(weights[name]) == len(embedding)}
    for name, layer in ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
        if name in alone:
            fill_rows(layer.weight, ids, weights[name])
    return {name: weight for name, weight in weights.items() if name not in alone}


def load_trained(model, state_dict: dict, what: str) -> None:
    """Copy some of the weights by name; a name or shape that the model lacks is an error."""
    # Buffers too: a checkpoint-N holds the persistent ones.
    targets = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(state_dict) - set(targets))
    if unknown:
        raise ValueError(
            f"{what}: the model has no {unknown[:5]} ({len(unknown)} in all); its config names another shape."
        )
    copy_weights({name: targets[name] for name in state_dict}, state_dict, what)


def fill_connector(connector, path: str) -> None:
    """Fill a connector from the weights in a file whose names contain `mm_projector.`."""
    weights = read_weights(path)
    named = {name: name.partition("mm_projector.")[2].removeprefix("image_spatial_proj.") for name in weights}
    picked = {inner: weights[name] for name, inner in named.items() if inner}
    if not picked:
        raise ValueError(f"{path!r} holds no mm_projector weights; found {sorted(weights)[:5]}.")
    load_into(connector, picked, f"connector weights of {path!r}")


def merge_adapter(model, checkpoint):
    """Return the model with the LoRA of a checkpoint merged: W + lora_alpha / r * B A, every key used."""
    tuned = open_adapter(model, checkpoint)
    if not any(is_partitioned(weight) for weight in tuned.parameters()):
        return merge_lora(tuned)
    if any(config.use_dora for config in tuned.peft_config.values()):
        raise ValueError(
            f"{checkpoint.path!r} holds a DoRA, which cannot be merged under ZeRO-3; merge it beforehand."
        )
    for module in tuned.modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "lora_A"):
            continue
        weight = module.get_base_layer().weight
        with torch.no_grad(), gathered([weight], modify=True):
            if weight.numel():
                weight += sum(module.get_delta_weight(name) for name in module.active_adapters).to(weight.dtype)
    return tuned.unload()


def merge_lora(tuned):
    """Return PEFT's model without its wrapping, LoRA merged.

    Where prompts pass the projections of a layer and not their LoRA (adaption_prompt_lora false), the two are kept
    apart: that of keys and values stays beside its weight.
    """
    model = tuned.get_base_model()
    if not getattr(model.config, "has_prompts", False) or model.config.adaption_prompt_lora:
        return tuned.merge_and_unload()
    for name, module in list(model.named_modules()):
        place, _, linear = name.rpartition(".")
        is_beside = linear in ("k_proj", "v_proj") and hasattr(model.get_submodule(place), "adaption_gate")
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer") and not is_beside:
            module.merge()
            setattr(model.get_submodule(place), linear, module.get_base_layer())
    return model


def open_adapter(model, checkpoint):
    """Return PEFT's model: the model with the LoRA of a checkpoint beside its weights, every key used.

    PEFT itself only warns about keys that do not fit.
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(
            f"{checkpoint.path!r} holds a LoRA adapter; install peft (pip install 'llava-lite[peft]')."
        ) from error
    path, config_file = checkpoint.path, checkpoint.file(ADAPTER)
    files = [file for name in ADAPTER_WEIGHTS if (file := checkpoint.file(name)) is not None]
    if config_file is None:
        raise OSError(f"{path!r} holds no LoRA to put on a base: it has no {ADAPTER}. Open it without a base.")
    if not files:
        raise OSError(f"{path!r} has an {ADAPTER} and no weights: {' and '.join(ADAPTER_WEIGHTS)} are missing.")
    weights = read_weights(files[0])
    # PEFT adds the full embeddings if the vocabulary has grown.
    tables = {name: weight for name, weight in weights.items() if llava.plain_name(name) in TABLES}
    new_rows = {llava.plain_name(name): weight for name, weight in tables.items()}
    load_trained(model, apply_new_rows(model, new_rows, 0), f"weights of {files[0]!r}")
    # For tied embeddings PEFT may save the rows of trainable_token_indices twice.
    saved = weights.keys() - tables.keys() - repeated_rows(weights)
    # A local directory, so that PEFT requests nothing from the Hub.
    directory = str(Path(config_file).parent)
    check_adapter(config_file, checkpoint.read_json(ADAPTER), weights)
    config = PeftConfig.from_pretrained(directory)
    has_image_parts = any(IMAGE_PARTS.search(f".{name}.") for name, _ in model.named_modules())
    if has_image_parts and not any(IMAGE_PARTS.search(name) and ".lora_" in name for name in saved):
        # LLaVA names layers by their last word, such as q_proj, before its tower, which has a q_proj too, is built.
        config.exclude_modules = config.exclude_modules or f".*{IMAGE_PARTS.pattern}.*"
    tuned = PeftModel.from_pretrained(model, directory, config=config)
    wanted = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - tables.keys()
    # Biases that were trained with LoRA (--lora_bias) are among the other weights.
    missing = {name for name in wanted - saved if ".lora_" in name}
    check_no_missing_or_unexpected(
        files[0], "the LoRA that its adapter_config.json describes", missing, saved - wanted
    )
    return tuned


def check_adapter(path, fields: dict, weights: dict) -> None:
    """Raise ValueError for an adapter_config.json that is not of LoRA, imports a module, or has other sizes."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is of an adapter of the kind {kind!r}; only LoRA is opened here.")
    if fields.get("megatron_config") is not None:
        raise ValueError(f"{path} names a module to import (megatron_core), which is never done here.")
    largest = max(
        (min(weight.shape) for name, weight in weights.items() if ".lora_" in name and weight.ndim), default=0
    )
    ranks = [fields.get("r", 8), *(fields.get("rank_pattern") or {}).values()]
    wrong = [rank for rank in ranks if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest]
    if wrong and largest:
        raise ValueError(
            f"{path} says that a LoRA has the rank {wrong[0]!r}, and its weights have ranks up to {largest}. "
            "It belongs to another adapter, or was changed."
        )


def repeated_rows(weights: dict) -> set[str]:
    """Return the names of PEFT's rows of single tokens in the head that repeat those of the input embeddings."""
    ends = (f".{layer}.token_adapter.trainable_tokens_delta" for layer in ("lm_head", "embed_tokens"))
    head, embedding = ({name for name in weights if name.endswith(end)} for end in ends)
    return {a for a in head for b in embedding if torch.equal(weights[a], weights[b])}


def check_no_missing_or_unexpected(path, what: str, missing: set[str], unexpected: set[str]) -> None:
    """Raise ValueError naming weights that a checkpoint lacks or the model has no place for."""
    if not missing and not unexpected:
        return
    found = [
        f"{len(keys)} {word}, such as {sorted(keys)[:5]}"
        for keys, word in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
    raise ValueError(
        f"weights of {str(path)!r} do not fit {what}: {'; '.join(found)}. "
        "Its config.json and its weights disagree, or the checkpoint is incomplete."
    )
