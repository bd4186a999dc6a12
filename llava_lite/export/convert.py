"""Turn a model of ours into a directory of transformers' own LLaVA, or back, and prove that its answers are equal.

`llava-lite convert SOURCE TARGET [--to transformers|llava]`. The written directory is opened again, asked the same
questions about the same images, and gets its name only if it gives the same answers.
"""

import gc
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from llava_lite.checkpoints.files import ADAPTER
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.torch_files import is_torch_checkpoint
from llava_lite.constants import IMAGE_TOKEN_INDEX
from llava_lite.conversation.end_tokens import add_end_token, get_end_token
from llava_lite.export import verify
from llava_lite.export.hf_directory import check_expressible, write_hf
from llava_lite.export.hf_processor import open_pil_processor, write_json
from llava_lite.export.originals import convert_original, write_release
from llava_lite.export.verified_directory import (
    TOLERANCE,
    check_empty,
    check_full_precision,
    finish_directory,
    get_our_answers,
    new_directory,
    push,
)
from llava_lite.formats import hf_llava as layout
from llava_lite.inference import load
from llava_lite.model.builder import as_dtype
from llava_lite.model.generation_config import read_generation_config

# Model type, width, patch and image side of a tower -> where it comes from.
TOWERS = {
    ("clip_vision_model", 1024, 14, 224): "openai/clip-vit-large-patch14",
    ("clip_vision_model", 1024, 14, 336): "openai/clip-vit-large-patch14-336",
    ("siglip_vision_model", 1152, 14, 384): "google/siglip-so400m-patch14-384",
}


def convert(
    source,
    target,
    to=None,
    dtype=None,
    tolerance=TOLERANCE,
    max_shard_size="5GB",
    push_to_hub=None,
    base=None,
    vision_tower=None,
    tokenizer=None,
    report=print,
):
    """Write `source` to the directory `target` in another layout and return how far its answers are from the source's.

    to: `transformers`, `llava` or `llama-adapter`; None for the one that the source is not in. base, vision_tower,
    tokenizer: of a file or directory that another system wrote, see export/originals.py; such a source has no answers
    of its own to compare, and every weight is accounted for instead. report: called with each line.
    Raises ValueError with the reason if the layout cannot hold the model, or if the answers differ; what was written
    is then left beside `target`, named *.unchecked.
    """
    if to == "llama-adapter":
        return write_release(source, target, report)
    if is_torch_checkpoint(source):
        if to == "transformers":
            raise ValueError(f"{str(source)!r} is first converted to a directory of ours: leave --to out.")
        convert_original(
            source, target, base, vision_tower, tokenizer, dtype and as_dtype(dtype), max_shard_size, report
        )
        return push(target, push_to_hub, report)
    given = {"--base": base, "--vision_tower": vision_tower, "--tokenizer": tokenizer}
    for flag, value in given.items():
        if value is not None:
            raise ValueError(f"{flag} {value} is for files that another system wrote; {str(source)!r} is none.")
    checkpoint = Checkpoint(source)
    checkpoint.check()
    check_empty(target)
    checkpoint.require_config()
    is_hf = checkpoint.format is layout
    to = to or ("llava" if is_hf else "transformers")
    if (to == "llava") != is_hf:
        found = "transformers' layout" if is_hf else "the layout of LLaVA and of this package"
        raise ValueError(f"{checkpoint.path!r} is in {found} already; nothing to convert.")
    if not is_hf:
        # First what no merge would mend.
        check_expressible(checkpoint)
        check_not_partial(checkpoint)
    check_full_precision(checkpoint)
    write = write_ours if is_hf else write_hf
    with new_directory(target) as unchecked:
        expected, notes = write(checkpoint, unchecked, dtype, max_shard_size)
    gc.collect()
    for note in notes:
        report(f"NOTE: {note}")
    found = get_our_answers(unchecked) if is_hf else get_hf_answers(unchecked)
    gap = finish_directory(target, expected, found, tolerance, report)
    push(target, push_to_hub, report)
    return gap


def check_not_partial(checkpoint):
    """Raise ValueError for a directory of trained weights alone, which `merge` merges into its base."""
    if checkpoint.named_base is not None or checkpoint.file(ADAPTER) is not None:
        raise ValueError(
            f"{checkpoint.path!r} holds only what was trained, and transformers' LLaVA has no place for an adapter of "
            f"ours. Merge it into its base first: llava-lite merge {checkpoint} DIRECTORY. It stays loadable here."
        )


def write_ours(checkpoint, directory, dtype, max_shard_size):
    """Write a checkpoint of transformers' LLaVA as a directory of ours; return (its own answers, notes)."""
    source = checkpoint.path
    expected = get_hf_answers(source, dtype)
    model, processor = load(source, device="cpu", dtype=dtype or "auto")
    # LLaVA's tools put -200 where an image stands; the vocabulary keeps its `<image>`, which is not used then.
    model.config.image_token_index = processor.image_token_index = IMAGE_TOKEN_INDEX
    grew = (checkpoint.fields.get(layout.RECORD) or {}).get("vocabulary")
    model.config.conv_template = processor.conv_template
    add_end_token(
        model.generation_config, get_end_token(processor.template(), processor.tokenizer), processor.tokenizer
    )
    if getattr(processor.image_processor, "do_pad", False):
        # LLaVA's tools and this package pad as config.json asks; not twice.
        processor.image_processor.do_pad = False
        model.config.image_aspect_ratio = processor.image_aspect_ratio = "pad"
    if grew is not None:
        model.resize_token_embeddings(grew["num_rows"])
        model.config.pad_token_id = model.generation_config.pad_token_id = grew["pad_token_id"]
        processor.tokenizer = without_tokens(processor.tokenizer, grew)
        processor.chat_template = processor.tokenizer.chat_template
    notes = name_tower(model.config)
    for answer, mine in zip(expected, verify.readings(processor), strict=True):
        if mine and not torch.equal(answer.input_ids, verify.placed(mine["input_ids"], IMAGE_TOKEN_INDEX)):
            raise ValueError(
                "LLaVA tokenizes the text after an image as a text of its own, which gives other ids with the "
                f"tokenizer of {source!r} than transformers' way. It stays loadable here as it is."
            )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    processor.save_pretrained(directory)
    if grew is not None:
        path = Path(directory) / "tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": grew["tokenizer_class"]}
        write_json(path, {key: value for key, value in fields.items() if value is not None})
    return expected, notes


def name_tower(config):
    """Set mm_vision_tower, which LLaVA's own loader needs; return a note if no name is known."""
    if config.mm_vision_tower is not None:
        return []
    tower = config.vision_config
    config.mm_vision_tower = TOWERS.get((tower.model_type, tower.hidden_size, tower.patch_size, tower.image_size))
    if config.mm_vision_tower is None:
        return [
            "The name of the vision tower is not known; LLaVA's own code needs it as "
            "mm_vision_tower, this package does not."
        ]
    # The weights are in the directory and may have been trained.
    config.unfreeze_mm_vision_tower = True
    return []


def without_tokens(tokenizer, grew):
    """Return the tokenizer as it was before `convert` gave it `<image>` and, perhaps, a padding token."""
    kept = json.loads(tokenizer.backend_tokenizer.to_str())
    kept["added_tokens"] = [token for token in kept["added_tokens"] if token["id"] < grew["num_tokens"]]
    named = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    named |= {"pad_token": grew["pad_token"], "model_max_length": tokenizer.model_max_length}
    named = {key: value for key, value in named.items() if value is not None}
    backend = Tokenizer.from_str(json.dumps(kept))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=grew["chat_template"], **named)


def get_hf_answers(directory, dtype=None):
    """Return what a directory answers through transformers alone, in float32 of the weights as `dtype` holds them."""
    generation = read_generation_config(
        Checkpoint(directory), AutoConfig.from_pretrained(directory, trust_remote_code=False)
    )
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype or "auto", generation_config=generation)
    model = model.eval().float()
    assert type(model).__module__.startswith("transformers."), type(model)
    processor = hf_processor(directory)
    answers = verify.answers(model, verify.readings(processor), processor.image_token_id)
    del model
    gc.collect()
    return answers


def hf_processor(directory):
    """Return transformers' processor of a directory, its images prepared with PIL.

    With torchvision it would choose its other backend, which resizes a little differently.
    """
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    processor.image_processor = open_pil_processor(directory)
    return processor
