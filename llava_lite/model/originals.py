"""Open what LLaMA-Adapter V2, ImageBind-LLM, LLaMA2-Accessory and Meta's LLaMA wrote with torch.save as a model.

A file or directory of theirs holds the base or stands on one: Meta's directory, or a model in Hugging Face's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaTokenizer

from llava_lite.checkpoints.partial import check_no_missing_or_unexpected, load_trained
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.torch_files import KINDS, META, TOKENIZER, is_torch_checkpoint, read_torch_checkpoint
from llava_lite.formats import meta_llama
from llava_lite.hub.json_files import check_json_of_tokenizer
from llava_lite.model.assemble import EMBEDDINGS, IS_LORA, add_lora, assemble, model_from_weights
from llava_lite.model.loading import CONNECTOR, TOWER, get_new_weights
from llava_lite.tower_config import feature_width, load_vision_config

TOKENIZERS = ("tokenizer.json", TOKENIZER)
QUERIES = f"{TOWER}vision_tower.query_tokens"
# Keys of a language model's config that params.json tells by other names.
LANGUAGE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LANGUAGE_KEYS += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "rope_scaling")
LANGUAGE_KEYS += ("tie_word_embeddings", "model_type")


class Original(NamedTuple):
    """A checkpoint of another system: the fields of our config, its weights under our names, and its base.

    base: the Checkpoint in Hugging Face's layout that it stands on, None where the weights hold the base. kind: META
    or one of KINDS.
    """

    kind: str
    fields: dict
    weights: dict[str, torch.Tensor]
    base: Checkpoint | None


def read_original(path, base=None, **options) -> Original:
    """Read a .pth file or a directory of consolidated.*.pth, on the base that it was trained on.

    base: Meta's directory, or a directory or hub id in Hugging Face's layout; needed by files that hold only what was
    trained. options: config keys that weights do not tell, see the `config_from` of the formats. Raises ValueError for
    weights that need a base and for a base that they do not fit, with both numbers.
    """
    is_meta_base = base is not None and is_torch_checkpoint(base)
    found = read_torch_checkpoint(base, path) if is_meta_base else read_torch_checkpoint(path)
    on = Checkpoint(base) if base is not None and not is_meta_base else None
    params = found.params if on is None else params_of(on)
    if not params:
        raise ValueError(
            f"{str(path)!r} has no params.json beside it, which tells the size of the model. Give its base: Meta's "
            "directory, or a model in Hugging Face's layout such as huggyllama/llama-7b (model_base=, --base)."
        )
    if found.kind == META:
        vocab_size = len(found.weights["tok_embeddings.weight"]) if "tok_embeddings.weight" in found.weights else None
        fields = meta_llama.config_from_params(params, vocab_size) | {"model_type": "llava_llama"} | options
        heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        weights = meta_llama.weights_from(found.weights, *heads)
    else:
        module, _ = KINDS[found.kind]
        fields = module.config_from(params, found.weights, **options)
        weights = module.weights_from(found.weights, fields)
    if EMBEDDINGS not in weights and on is None:
        raise ValueError(
            f"{str(path)!r} holds only what was trained ({found.kind}) and no language model. Give the base that it "
            "was trained on: Meta's directory, or a model in Hugging Face's layout (model_base=, --base)."
        )
    return Original(found.kind, fields, weights, on if EMBEDDINGS not in weights else None)


def params_of(base: Checkpoint) -> dict:
    """Return what Meta's params.json would say of a Llama in Hugging Face's layout; ValueError for another model."""
    config = base.config
    if config.model_type.removeprefix("llava_") != "llama":
        raise ValueError(
            f"the base {base.path!r} is a {config.model_type}; LLaMA-Adapter, ImageBind-LLM and Accessory train LLaMA."
        )
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        # The width of an MLP, here of 1, is rounded up to a multiple of this.
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": 1.5 / int(8 * config.hidden_size / 3),
        "max_seq_len": config.max_position_embeddings,
    }


def open_original(path, base=None, vision_tower=None, dtype=None, attn_implementation=None, **options):
    """Return the model of another system's checkpoint, in eval mode, every weight accounted for.

    path, base, options: as in read_original. vision_tower: directory or hub id of the encoder, where the checkpoint
    does not hold it; None for the one that its system used. dtype: of the weights; None for that of the base, else
    that of the language model. The LoRA of a release is merged where prompts do not pass it.
    """
    original = read_original(path, base, **options)
    lora = {name: weight for name, weight in original.weights.items() if IS_LORA.search(name)}
    weights = {name: weight for name, weight in original.weights.items() if name not in lora}
    tower = vision_tower or original.fields.get("mm_vision_tower")
    check_tower(path, original, tower)
    named = {"dtype": dtype, "attn_implementation": attn_implementation}
    named = {name: value for name, value in named.items() if value is not None}
    if original.base is None:
        fields = original.fields | ({"mm_vision_tower": tower} if tower else {})
        model = model_from_weights(fields | held_tower(fields, weights, vision_tower), weights, **named)
    else:
        overrides = {key: value for key, value in original.fields.items() if key not in LANGUAGE_KEYS}
        holds_tower = any(name.startswith(TOWER) for name in weights)
        if holds_tower:
            raise ValueError(
                f"{str(path)!r} holds its own vision tower and no language model; give Meta's directory as the base."
            )
        model = assemble(original.base, tower, config_overrides=overrides, **named)
        check_complete(model, weights, f"{str(path)!r} on {original.base.path!r}")
        load_trained(model, weights, f"weights of {str(path)!r}")
    return add_lora(model, lora).eval()


def check_tower(path, original: Original, tower: str | None) -> None:
    """Raise ValueError where the connector has no vision tower, or one whose features have another width."""
    width = original.fields.get("mm_hidden_size")
    if original.fields.get("vision_config") is not None or not any(CONNECTOR in name for name in original.weights):
        return
    if tower is None:
        raise ValueError(
            f"{str(path)!r} has a connector for features of width {width} and no vision tower, and that of the system "
            "is of another width. Name the tower that it was trained with (vision_tower=, --vision_tower)."
        )
    found = feature_width(
        SimpleNamespace(**{"mm_vision_projection": False} | original.fields), load_vision_config(tower)
    )
    if found != width:
        raise ValueError(
            f"vision tower {tower!r} gives features of width {found}, the connector of {str(path)!r} reads {width}. "
            "Name the tower that it was trained with."
        )


def held_tower(fields: Mapping, weights: Mapping, vision_tower: str | None) -> dict:
    """Return the config of a BLIP-2 whose weights the checkpoint holds, which is then not looked for elsewhere.

    Its sizes are those of the named tower, else of blip2-opt-2.7b, transformers' defaults.
    """
    queries = weights.get(QUERIES)
    if queries is None or fields.get("vision_config") is not None:
        return {}
    if vision_tower is not None:
        return {"vision_config": load_vision_config(vision_tower)}
    return {"vision_config": {"model_type": "blip-2", "num_query_tokens": queries.shape[1]}}


def check_complete(model, weights: Mapping, what: str) -> None:
    """Raise ValueError for weights that neither the base nor the checkpoint holds."""
    new = get_new_weights(model.config)
    names = {name for name, _ in model.named_parameters() if name.startswith((CONNECTOR, *new))}
    check_no_missing_or_unexpected(what, type(model).__name__, names - set(weights), set())


def load_original(path, base=None, vision_tower=None, tokenizer=None, **kwargs):
    """Return (tokenizer, model, image processor) of another system's checkpoint; image processor None without a tower.

    tokenizer: directory or hub id; None for that of the base, or the tokenizer.model of Meta's directory, in it or
    above it. kwargs: of open_original.
    """
    places = [tokenizer] if tokenizer is not None else tokenizer_places(path, base)
    opened = open_tokenizer(places)
    model = open_original(path, base, vision_tower, **kwargs)
    tower = model.get_vision_tower()
    return opened, model, None if tower is None else tower.image_processor


def tokenizer_places(path, base) -> list[Path]:
    """Return where the tokenizer of a checkpoint may be: a base in Hugging Face's layout, else Meta's directories."""
    if base is not None and not is_torch_checkpoint(base):
        return [base]
    directories = [Path(place) if Path(place).is_dir() else Path(place).parent for place in (base, path) if place]
    return [one for directory in directories for one in (directory, directory.parent)]


def open_tokenizer(places):
    """Return the tokenizer of the first place that has one; OSError with the places if none has."""
    for place in places:
        if not Path(place).is_dir() or any((Path(place) / name).is_file() for name in TOKENIZERS):
            check_json_of_tokenizer(Checkpoint(place).file)
            if Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file():
                return LlamaTokenizer.from_pretrained(place)
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    listed = ", ".join(repr(str(place)) for place in places)
    raise OSError(f"no tokenizer found; looked for {' and '.join(TOKENIZERS)} in {listed}. Name one with tokenizer=.")
