"""Find what stands beside the weights of a checkpoint: tokenizer, image processor, prompt format."""

import json
import os
from importlib import import_module
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import PROCESSOR_NAME, cached_file, logging

from llava_lite.formats import arcade100k
from llava_lite.hub import everywhere, in_words
from llava_lite.mm_utils import load_image_processor
from llava_lite.model_source import check_source

logger = logging.get_logger(__name__)

# For checkpoints that do not say what trained them, as all of LLaVA's own: the format of the recipe that goes with
# the decoder (LLaVA v1.5 and v1.6, MoE-LLaVA).
TEMPLATE_OF_DECODER = {
    "llama": "v1",
    "mistral": "mistral_instruct",
    "qwen2": "qwen",
    "qwen3": "chat",
    "phi": "phi",
    "stablelm": "stablelm",
}

# What a tokenizer.json that is complete in itself is saved as, by transformers 4 and 5.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
ARCADE100K_FIELDS = ("pad_token", "unk_token", "model_max_length", "padding_side", "chat_template")
BASE = "base_model_name_or_path"
# What a tokenizer of the decoders here is made of; the last is of StableLM 2.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", arcade100k.FILE)


def template_of(config, tokenizer=None):
    """Return the name of the prompt format that a checkpoint was trained with, or that of its decoder's recipe.

    A model that LLaVA never trained, plain or of transformers, is asked in its tokenizer's own chat template where
    there is one, as an instruct model has; a base model has none and gets the recipe's.
    """
    stored = getattr(config, "conv_template", None)
    if stored is not None:
        return stored
    has_own = getattr(tokenizer, "chat_template", None) is not None
    is_plain = not hasattr(config, "has_vision_tower")
    # An image placeholder with an id of the vocabulary: a LLaVA of transformers.
    if has_own and (is_plain or getattr(config, "image_token_index", -200) >= 0):
        return "chat"
    decoder = config.model_type.removeprefix("moe_").removeprefix("llava_lite_").removeprefix("llava_")
    guess = TEMPLATE_OF_DECODER.get(decoder, "chat" if has_own else "v1")
    guess = "v1" if guess == "chat" and not has_own else guess
    logger.info(f"config.json names no conv_template; a {config.model_type} model is asked in the format {guess!r}.")
    return guess


def refuse_missing_model(name, **hub):
    """Raise ValueError if no model is named, OSError if the one that is named can be found nowhere."""
    if name is None:
        raise ValueError("--model_name_or_path is needed: a language model, or the output of an earlier stage.")
    check_source(name, "--model_name_or_path", **hub)


def load_tokenizer(name, base=None, **hub):
    """Load the tokenizer of a checkpoint, or that of its base where the folder holds only what was trained.

    base: a folder or hub id, or a config that names one; LLaVA's LoRA folders name theirs in adapter_config.json.
    """
    base = getattr(base, BASE, base if isinstance(base, (str, os.PathLike)) else None)
    own = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    base = base or read_json(name, "adapter_config.json", hub).get(BASE)
    if own is None and base is not None:
        # The base may itself be only what was trained.
        base = find_base(str(base), name)
        return load_tokenizer(base, read_json(base, "config.json", everywhere(hub)).get(BASE), **everywhere(hub))
    # Transformers does not believe that a Qwen2 may have another tokenizer than Qwen2's, and puts Qwen2's way of
    # splitting words over the saved vocabulary: other ids than those it was trained with.
    is_generic = read_json(name, "tokenizer_config.json", hub).get("tokenizer_class") in GENERIC_TOKENIZERS
    has_all = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub) is not None
    kind = PreTrainedTokenizerFast if is_generic and has_all else AutoTokenizer
    if not has_all and cached_file(name, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **hub):
        need_sentencepiece(name)
    words = cached_file(name, arcade100k.FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if words is not None and not has_all:
        saved = read_json(name, "tokenizer_config.json", hub)
        return arcade100k.read_arcade100k(words, **{k: saved[k] for k in ARCADE100K_FIELDS if k in saved})
    try:
        with in_words(name, **hub):
            tokenizer = kind.from_pretrained(name, **hub)
    except OSError:
        # Of the Hub, and told.
        raise
    # Of a file cut short or not fetched transformers and tokenizers raise nearly everything, or ask for tiktoken.
    except Exception as error:
        refuse_broken_vocabulary(name, hub, error)
        raise
    return with_chat_template(tokenizer, name, hub)


def refuse_broken_vocabulary(name, hub, error):
    """Raise OSError if a checkpoint has no vocabulary, ValueError if its file is no such thing; else do nothing."""
    files = {
        file: cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in VOCABULARIES
    }
    files = {file: path for file, path in files.items() if path is not None}
    if not files:
        raise OSError(
            f"{str(name)!r} holds no tokenizer: none of {', '.join(VOCABULARIES)}. Copy the tokenizer files of the "
            "language model that it was trained on beside its weights."
        ) from error
    for file, path in files.items():
        with open(path, "rb") as stream:
            is_pointer = stream.read(20) == b"version https://git-"
        if is_pointer or file == "tokenizer.model" or not _is_json(path, file):
            reason = "it is a git-lfs pointer: run git lfs pull beside it" if is_pointer else "copy it again"
            raise ValueError(f"{str(path)!r} cannot be read as a tokenizer; {reason}.") from error


def _is_json(path, file):
    try:
        with open(path, encoding="utf-8") as stream:
            return not file.endswith(".json") or isinstance(json.load(stream), dict)
    except ValueError:
        return False


def need_sentencepiece(name):
    """Raise ImportError with what to install, if a vocabulary of SentencePiece alone cannot be read.

    transformers would ask for tiktoken, which does not help.
    """
    missing = []
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        try:
            import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"{str(name)!r} holds its vocabulary as tokenizer.model and not as tokenizer.json, as those of LLaVA and "
            f"Vicuna do; to read it: pip install {' '.join(missing)}."
        )


def find_base(base, path):
    """Return the base of a partial folder as it can be opened: as named, else beside the folder.

    Raises OSError if it is the path of a folder that is not there.
    """
    beside = Path(path) / base
    is_beside = not Path(base).exists() and not Path(base).is_absolute() and beside.exists()
    found = str(beside) if is_beside else base
    if Path(found).is_absolute() and not Path(found).exists():
        raise OSError(
            f"{str(path)!r} holds only what was trained; its base {base!r} is not there. Move the base back, name it "
            "(load_pretrained_model(..., model_base=...), or base_model_name_or_path in its config.json), or train "
            "with --save_full True."
        )
    return found


def with_chat_template(tokenizer, name, hub):
    """Give a tokenizer the chat template that a folder of transformers' LLaVA keeps beside it.

    Where `convert` wrote the folder, that is the one which the tokenizer came with: ours are written another way.
    """
    grew = read_json(name, "config.json", hub).get("llava_lite", {}).get("vocabulary")
    if grew is not None:
        tokenizer.chat_template = grew["chat_template"]
    elif tokenizer.chat_template is None:
        saved = [read_json(name, file, hub).get("chat_template") for file in ("chat_template.json", PROCESSOR_NAME)]
        tokenizer.chat_template = next(filter(None, saved), None)
    return tokenizer


def image_processor_of(name, config, **hub):
    """Load the image processor of a checkpoint: its own file, else that of the tower; None if it sees nothing."""
    if not getattr(config, "has_vision_tower", False):
        return None
    saved = [read_json(name, file, hub) for file in (PROCESSOR_NAME, "preprocessor_config.json")]
    if "image_processor" in saved[0] or saved[1]:
        return load_image_processor(name, **hub)
    if config.mm_vision_tower is None:
        raise OSError(f"{name} has no preprocessor_config.json and names no mm_vision_tower to take it from.")
    if os.path.isabs(config.mm_vision_tower) and not os.path.isdir(config.mm_vision_tower):
        raise OSError(
            f"{str(name)!r} has no preprocessor_config.json, and the vision tower that it would be taken from, "
            f"{config.mm_vision_tower!r}, is not there. Copy the tower's beside the weights, or name the tower as "
            "mm_vision_tower in config.json."
        )
    with in_words(config.mm_vision_tower, **everywhere(hub)):
        return load_image_processor(config.mm_vision_tower, **everywhere(hub))


def read_json(name, file, hub):
    """Return a JSON file of a checkpoint as a dict, empty where there is none."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        return {}
    with open(os.fspath(path), encoding="utf-8") as stream:
        text = stream.read()
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Copy it again, or write it anew.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__} and no fields. Copy it again, or write it anew.")
    return fields
