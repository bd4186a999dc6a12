"""Put what a folder says was trained (connector, new words, LoRA) into the base model that it stands on."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from llava_lite.companions import read_json
from llava_lite.formats import foreign_format, llava
from llava_lite.model.checkpoint_weights import adapter_of_step, holds_step, step_weights
from llava_lite.model.new_words import is_row_name, take_saved_rows
from llava_lite.model.vocabulary import EMBEDDING, HEAD, fill_rows, fit_rows
from llava_lite.model.weight_files import PICKLED, SAFE, find_file
from llava_lite.model.weights import check_shapes, gathered, is_partitioned, read_weights

logger = logging.getLogger(__name__)

# Files of trained weights; where several hold a weight, the first counts.
PROJECTOR = "mm_projector.bin"
TRAINED = ("trained.safetensors", "non_lora_trainables.bin", PROJECTOR)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
TABLES = (EMBEDDING, HEAD)
PICTURE_PARTS = re.compile(r"\.(vision_tower|mm_projector)\.")
WHOLE = (SAFE, f"{SAFE}.index.json", PICKLED, f"{PICKLED}.index.json")


def base_of(path, named: str | None, hub: dict) -> str | None:
    """Return the base that a folder or hub id stands on, None for a whole checkpoint.

    named: what its config.json says of it; LLaVA's LoRA folders name it in adapter_config.json. Raises ValueError if
    what is there was trained on a base that nothing names.
    """
    if named:
        return named
    # Only to see what is there: force_download would fetch the weights once more for it.
    hub = {name: value for name, value in hub.items() if name != "force_download"}
    if path is None or any(find_file(path, name, hub) is not None for name in WHOLE):
        return None
    of_adapter = read_json(path, ADAPTER, hub).get("base_model_name_or_path")
    if of_adapter:
        return of_adapter
    parts = [name for name in (*TRAINED, *ADAPTER_WEIGHTS) if find_file(path, name, hub) is not None]
    if parts:
        raise ValueError(
            f"{str(path)!r} holds only what was trained ({', '.join(parts)}) and names no base. Give the model that "
            "it was trained on: load_pretrained_model(..., model_base=...), or base_model_name_or_path in its "
            "config.json."
        )
    return None


def take_trained(model, path, num_rows: int, hub: dict):
    """Return the model with a folder's own weights in it, LoRA folded in, and the names of those weights.

    num_rows: vocab_size of the folder's config. Raises ValueError with the names of weights that do not fit.
    """
    if holds_step(path):
        return take_step(model, path, num_rows, hub)
    files = [file for name in TRAINED if (file := find_file(path, name, hub)) is not None]
    has_adapter = find_file(path, ADAPTER, hub) is not None
    if not has_adapter:
        refuse_lost_adapter(path, hub)
    if not files and not has_adapter:
        is_whole = any(find_file(path, name, hub) is not None for name in WHOLE)
        raise OSError(
            f"{str(path)!r} holds nothing to put on a base: none of {', '.join((*TRAINED, ADAPTER))}. "
            + ("It is a whole model: open it without a base." if is_whole else "Copy it again.")
        )
    weights, fields = {}, read_json(path, "config.json", hub)
    for file in reversed(files):
        weights |= read_trained(file, fields)
    where, filled = f"weights of {(files or [path])[0]!r}", set(weights)
    load_with_rows(model, weights, fields, num_rows, where)
    return merge_adapter(model, path, hub) if has_adapter else model, filled


def take_step(model, path, num_rows: int, hub: dict):
    """Return the model with what a checkpoint-N had trained in it, LoRA folded in, and the names of those weights."""
    weights, adapter = step_weights(path)
    projector = find_file(path, PROJECTOR, hub)
    # The connector is there too where it did not train: it may have come from a file of its own.
    frozen = {} if projector is None else read_trained(projector, {})
    weights = frozen | dict(weights)
    load_with_rows(model, weights, read_json(path, "config.json", hub), num_rows, f"weights of {str(path)!r}")
    if not adapter:
        return model, set(weights)
    with adapter_of_step(path, adapter) as folder:
        return merge_adapter(model, folder, {}), set(weights)


def load_with_rows(model, weights: dict[str, torch.Tensor], fields: dict, num_rows: int, where: str) -> None:
    """Put trained weights in the model, rows of new words in their places. fields: of the config.json beside them."""
    if any(is_row_name(name) for name in weights):
        fit_rows(model, num_rows, model.config.vocab_size)
        weights = take_saved_rows(model, weights, fields.get("new_words"), where)
    load_trained(model, take_new_rows(model, weights, num_rows), where)


def refuse_lost_adapter(path, hub: dict) -> None:
    """Raise OSError if there are weights of an adapter and nothing that says how to put them on the base."""
    lost = [name for name in ADAPTER_WEIGHTS if find_file(path, name, hub) is not None]
    if lost:
        raise OSError(
            f"{str(path)!r} holds {lost[0]} and no {ADAPTER}, which says where they go and how they are scaled. "
            "Copy it beside them."
        )


def refuse_lost_parts(path, hub: dict) -> None:
    """Raise OSError if trained weights stand beside an adapter without the config.json that says what they are."""
    lost = [name for name in TRAINED if find_file(path, name, hub) is not None]
    if lost:
        raise OSError(
            f"{str(path)!r} holds {', '.join(lost)} and no config.json, which says what model the weights belong to. "
            "Copy it beside them."
        )


def read_trained(file: str, fields: dict) -> dict:
    """Return the weights of a file of trained weights under our names; fields: the raw config.json beside it."""
    weights = llava.weights_from(read_weights(file), fields)
    foreign = foreign_format(fields)
    return weights if foreign is None else foreign.weights_from(weights, fields)


def take_new_rows(model, weights: dict[str, torch.Tensor], num_rows: int) -> dict[str, torch.Tensor]:
    """Fit the vocabulary to weights that were trained with other words than the base has; return those left to load.

    num_rows: vocab_size of the config that came with the weights. LLaVA writes the embedding as a whole, or only the
    rows of <im_start> and <im_end>, which are its last ones; those, and rows of the head beside them, are copied here.
    """
    # Of the config: a weight that ZeRO-3 has partitioned has no rows to count.
    num_old, embedding = model.config.vocab_size, weights.get(EMBEDDING)
    num_given = 0 if embedding is None else embedding.shape[0]
    is_rows_alone = 0 < num_given <= 2 < num_old
    if is_rows_alone and num_rows <= num_old:
        # That config was written before the words were added: they come right after the base's.
        num_rows = num_old + num_given
    elif embedding is not None and not is_rows_alone:
        num_rows = num_given
        if num_rows < num_old:
            # LLaVA cuts the padding of a vocabulary off.
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
    """Copy a part of the weights by name; a name or shape that the model lacks is an error."""
    # Buffers too: a checkpoint of a run's state holds those that are saved.
    targets = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
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
                # One by one: of ZeRO-3 they are put together only here.
                target.copy_(state_dict[name].contiguous())


def merge_adapter(model, path, hub: dict):
    """Return the model with the LoRA of a folder or hub id folded in: W + lora_alpha / r * B A, every key used."""
    tuned = open_adapter(model, path, hub)
    if not any(is_partitioned(weight) for weight in tuned.parameters()):
        return tuned.merge_and_unload()
    if any(config.use_dora for config in tuned.peft_config.values()):
        raise ValueError(f"{str(path)!r} holds a DoRA, which cannot be folded in under ZeRO-3; fold it in beforehand.")
    for module in tuned.modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "lora_A"):
            continue
        weight = module.get_base_layer().weight
        with torch.no_grad(), gathered([weight], modify=True):
            if weight.numel():
                weight += sum(module.get_delta_weight(name) for name in module.active_adapters).to(weight.dtype)
    return tuned.unload()


def open_adapter(model, path, hub: dict):
    """Return the model with the LoRA of a folder or hub id beside its weights, as PEFT's model, every key used.

    PEFT itself only warns about keys that do not fit.
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} holds a LoRA adapter; install peft (pip install 'llava-lite[peft]')."
        ) from error
    files = [file for name in ADAPTER_WEIGHTS if (file := find_file(path, name, hub)) is not None]
    config_file = find_file(path, ADAPTER, hub)
    if config_file is None:
        raise OSError(f"{str(path)!r} holds no LoRA to put on a base: it has no {ADAPTER}. Open it without a base.")
    if not files:
        raise OSError(f"{str(path)!r} has an {ADAPTER} and no weights: {' and '.join(ADAPTER_WEIGHTS)} are missing.")
    weights = read_weights(files[0])
    # PEFT adds the embeddings, whole, where the vocabulary has grown.
    tables = {name: weight for name, weight in weights.items() if llava.plain_name(name) in TABLES}
    new_rows = {llava.plain_name(name): weight for name, weight in tables.items()}
    load_trained(model, take_new_rows(model, new_rows, 0), f"weights of {files[0]!r}")
    # Of tied embeddings PEFT may save the rows of trainable_token_indices twice.
    saved = weights.keys() - tables.keys() - repeated_rows(weights)
    # A local folder, so that PEFT looks nothing up by itself.
    folder = str(Path(config_file).parent)
    config = PeftConfig.from_pretrained(folder)
    has_picture_parts = any(PICTURE_PARTS.search(f".{name}.") for name, _ in model.named_modules())
    if has_picture_parts and not any(PICTURE_PARTS.search(name) and ".lora_" in name for name in saved):
        # LLaVA names layers by their last word, q_proj, while its tower, which has one too, was not there yet.
        config.exclude_modules = config.exclude_modules or f".*{PICTURE_PARTS.pattern}.*"
    tuned = PeftModel.from_pretrained(model, folder, config=config)
    wanted = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - tables.keys()
    # Biases that were trained along (--lora_bias) stand among the other weights.
    missing = {name for name in wanted - saved if ".lora_" in name}
    refuse_strays(files[0], "the LoRA that its adapter_config.json describes", missing, saved - wanted)
    return tuned


def repeated_rows(weights: dict) -> set[str]:
    """Return the names of PEFT's rows of single words in the head that are those of the input embeddings once more."""
    ends = (f".{layer}.token_adapter.trainable_tokens_delta" for layer in ("lm_head", "embed_tokens"))
    head, embedding = ({name for name in weights if name.endswith(end)} for end in ends)
    return {a for a in head for b in embedding if torch.equal(weights[a], weights[b])}


def refuse_strays(path, what: str, missing: set[str], unexpected: set[str]) -> None:
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
