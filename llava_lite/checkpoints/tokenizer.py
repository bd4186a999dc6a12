"""Load what stands beside the weights of a checkpoint: tokenizer, image processor, prompt format.

In every function `checkpoint` is a `source.Checkpoint`; the loaders also take a directory or hub id.
"""

import json
import os
from importlib import import_module

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import PROCESSOR_NAME, logging

from llava_lite.checkpoints.config import read_upstream_config
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import verify_texts
from llava_lite.formats import arcade100k
from llava_lite.hub.json_files import check_json_of_tokenizer
from llava_lite.media.preprocess import load_image_processor

logger = logging.get_logger(__name__)

# For checkpoints without a conv_template, as all of LLaVA's own: the format of the decoder's recipe (LLaVA v1.5 and
# v1.6, MoE-LLaVA).
TEMPLATE_OF_DECODER = {
    "llama": "v1",
    "mistral": "mistral_instruct",
    "qwen2": "qwen",
    "qwen3": "chat",
    "phi": "phi",
    "stablelm": "stablelm",
}

# Class names under which transformers 4 and 5 save a tokenizer that is complete in tokenizer.json.
COMPLETE = ("PreTrainedTokenizerFast", "TokenizersBackend")
ARCADE100K_FIELDS = ("pad_token", "unk_token", "model_max_length", "padding_side", "chat_template")
# Fraction of a base's tokens: those that one of the two was given later are fewer.
MOST_OTHER_IDS = 0.01
IMAGE_PROCESSOR = "preprocessor_config.json"
# Vocabulary files of the decoders here; the last is of StableLM 2.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARIES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json", arcade100k.FILE)


def get_template_name(config, tokenizer=None):
    """Return the name of the prompt format that a checkpoint was trained with, or that of its decoder's recipe.

    A plain model, or one of transformers' LLaVA, gets its tokenizer's own chat template if there is one, as in an
    instruct model; a base model has none and gets the recipe's.
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


def load_tokenizer(checkpoint, base=None):
    """Load the tokenizer of a checkpoint, or that of its base if the directory holds only trained weights.

    base: a directory or hub id that replaces the base which the checkpoint names.
    """
    checkpoint = Checkpoint.open(checkpoint, base=base)
    verify_texts(checkpoint.path)
    if checkpoint.file(TOKENIZER_CONFIG) is None and checkpoint.named_base is not None:
        # The base may itself hold only trained weights.
        return load_tokenizer(checkpoint.stands_on(checkpoint.named_base))
    saved = checkpoint.read_json(TOKENIZER_CONFIG)
    has_all = checkpoint.file(TOKENIZER_FILE) is not None
    check_json_of_tokenizer(checkpoint.file)
    if not has_all and checkpoint.file("tokenizer.model") is not None:
        need_sentencepiece(checkpoint)
    ranks = None if has_all else checkpoint.file(arcade100k.FILE)
    if ranks is not None:
        return arcade100k.read_arcade100k(ranks, **{k: saved[k] for k in ARCADE100K_FIELDS if k in saved})
    try:
        with checkpoint.readable_errors():
            tokenizer = _open_tokenizer(checkpoint, is_complete=has_all and saved.get("tokenizer_class") in COMPLETE)
    except OSError:
        # From the Hub, and readable already.
        raise
    # For a file cut short or not fetched transformers and tokenizers raise nearly everything, or ask for tiktoken.
    except Exception as error:
        check_vocabulary(checkpoint, error)
        raise
    return with_chat_template(tokenizer, checkpoint)


def check_vocabulary_of_base(checkpoint, tokenizer):
    """Raise ValueError if the base has another vocabulary than the tokenizer of the weights that stand on it.

    The base's tokenizer is read only where the two configs name another number of rows, which in a right base is its
    padding or the new tokens of one of the two.
    """
    base = checkpoint.base
    if base is None or checkpoint.file(TOKENIZER_CONFIG) is None or base.file(TOKENIZER_CONFIG) is None:
        return
    sizes = [one.fields.get("vocab_size") for one in (checkpoint, base)]
    if None in sizes or sizes[0] == sizes[1]:
        return
    own, words = tokenizer.get_vocab(), load_tokenizer(base).get_vocab()
    other = [word for word, number in words.items() if own.get(word) != number]
    if len(other) > MOST_OTHER_IDS * len(words):
        word = min(other, key=words.get)
        raise ValueError(
            f"{checkpoint.path!r} stands on another vocabulary than that of {base.path!r}: {len(other):,} of the "
            f"{len(words):,} tokens of the base have another id or none in it, such as {word!r} with {words[word]} in "
            f"the base and {own.get(word)} in it. Give the base that it was trained on."
        )


def _open_tokenizer(checkpoint, is_complete: bool):
    if is_complete:
        # transformers replaces the way of splitting words that is saved with a Qwen2 by that of Qwen2's own tokenizer:
        # other ids than in training.
        return PreTrainedTokenizerFast.from_pretrained(checkpoint.path, **checkpoint.keywords)
    config = read_upstream_config(checkpoint.path, checkpoint.fields)
    return AutoTokenizer.from_pretrained(
        checkpoint.path, config=config, trust_remote_code=False, **checkpoint.keywords
    )


def check_vocabulary(checkpoint, error):
    """Raise OSError if a checkpoint has no vocabulary, ValueError if its file is broken; else do nothing."""
    files = {file: path for file in VOCABULARIES if (path := checkpoint.file(file)) is not None}
    if not files:
        raise OSError(
            f"{checkpoint.path!r} holds no tokenizer: none of {', '.join(VOCABULARIES)}. Copy the tokenizer files of "
            "the language model that it was trained on beside its weights."
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
    except (ValueError, RecursionError):
        return False


def need_sentencepiece(checkpoint):
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
            f"{checkpoint.path!r} holds its vocabulary as tokenizer.model and not as tokenizer.json, as those of "
            f"LLaVA and Vicuna do; to read it: pip install {' '.join(missing)}."
        )


def with_chat_template(tokenizer, checkpoint):
    """Give a tokenizer the chat template that a directory of transformers' LLaVA keeps beside it.

    In a directory that `convert` wrote it is the one that the tokenizer came with; the written one is made from ours.
    """
    grew = checkpoint.fields.get("llava_lite", {}).get("vocabulary")
    if grew is not None:
        tokenizer.chat_template = grew["chat_template"]
    elif tokenizer.chat_template is None:
        saved = [checkpoint.read_json(file).get("chat_template") for file in ("chat_template.json", PROCESSOR_NAME)]
        tokenizer.chat_template = next(filter(None, saved), None)
    return tokenizer


def get_image_processor(checkpoint, config=None):
    """Load the image processor of a checkpoint, else that of its vision tower; None for a model without a tower.

    config: None for the checkpoint's own.
    """
    checkpoint = Checkpoint.open(checkpoint)
    config = checkpoint.config if config is None else config
    if not getattr(config, "has_vision_tower", False):
        return None
    if "image_processor" in checkpoint.read_json(PROCESSOR_NAME) or checkpoint.read_json(IMAGE_PROCESSOR):
        return open_image_processor(checkpoint)
    tower = config.mm_vision_tower
    if tower is None:
        raise OSError(f"{checkpoint} has no {IMAGE_PROCESSOR} and names no mm_vision_tower to take it from.")
    if os.path.isabs(tower) and not os.path.isdir(tower):
        raise OSError(
            f"{checkpoint.path!r} has no {IMAGE_PROCESSOR}, and the vision tower that it would be taken from, "
            f"{tower!r}, is not there. Copy the tower's beside the weights, or name the tower as "
            "mm_vision_tower in config.json."
        )
    return open_image_processor(checkpoint.beside(tower))


def open_image_processor(checkpoint):
    """Load the image processor that a checkpoint or a vision tower holds."""
    with checkpoint.readable_errors():
        # Named, since transformers would read config.json to choose between this name and another.
        return load_image_processor(checkpoint.path, image_processor_filename=IMAGE_PROCESSOR, **checkpoint.keywords)
