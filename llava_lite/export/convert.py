"""Turn a model of ours into a folder of transformers' own LLaVA, or back, and prove that it says the same.

`llava-lite convert SOURCE TARGET [--to transformers|llava]`. The written folder is opened again, asked the same
questions about the same pictures, and gets its name only if it gives the same answers.
"""

import gc
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from llava_lite.commands.convert import build_parser
from llava_lite.companions import read_json
from llava_lite.constants import IMAGE_TOKEN_INDEX
from llava_lite.end_marks import add_end_mark, end_mark_of
from llava_lite.export import witness
from llava_lite.export.checked_folder import (
    TOLERANCE,
    check_full_precision,
    finish_folder,
    push,
    refuse_full,
    removed_on_error,
    start_folder,
)
from llava_lite.export.stock_folder import refuse_inexpressible, write_stock
from llava_lite.export.stock_processor import write_json
from llava_lite.formats import transformers_llava as layout
from llava_lite.hub import in_words, require_config
from llava_lite.inference import load
from llava_lite.model.loading import generation_arguments
from llava_lite.model_source import check_source

# Model type, width, patch and picture side of a tower -> where it comes from.
TOWERS = {
    ("clip_vision_model", 1024, 14, 224): "openai/clip-vit-large-patch14",
    ("clip_vision_model", 1024, 14, 336): "openai/clip-vit-large-patch14-336",
    ("siglip_vision_model", 1152, 14, 384): "google/siglip-so400m-patch14-384",
}


def convert(
    source, target, to=None, dtype=None, tolerance=TOLERANCE, max_shard_size="5GB", push_to_hub=None, say=print
):
    """Write `source` to the folder `target` in another layout and return how far its answers are from the source's.

    to: `transformers` or `llava`; None for the one that the source is not in. say: takes each line of the report.
    Raises ValueError with the reason if the layout cannot hold the model, or if the answers differ; what was written
    is then left beside `target` under a name that says so.
    """
    source = str(source)
    check_source(source)
    refuse_full(target)
    with in_words(source):
        # Aloud: of a file that cannot be reached, read_json says only that there is none.
        require_config(source, {})
        config = read_json(source, "config.json", {})
        check_full_precision(source)
    is_stock = layout.claims(config)
    to = to or ("llava" if is_stock else "transformers")
    if (to == "llava") != is_stock:
        found = "transformers' layout" if is_stock else "the layout of LLaVA and of this package"
        raise ValueError(f"{str(source)!r} is in {found} already; nothing to convert.")
    if not is_stock:
        refuse_partial(source, config)
        refuse_inexpressible(source)
    unchecked = start_folder(target)
    write = write_ours if is_stock else write_stock
    with removed_on_error(unchecked):
        expected, notes = write(source, unchecked, dtype, max_shard_size)
    gc.collect()
    for note in notes:
        say(f"NOTE: {note}")
    found = answers_of_ours(unchecked) if is_stock else answers_of_stock(unchecked)
    gap = finish_folder(target, expected, found, tolerance, say)
    if push_to_hub is not None:
        say(push(target, push_to_hub))
    return gap


def refuse_partial(source, config):
    """Raise ValueError if a folder holds only what was trained; merging is another verb and says what it folded."""
    adapter = read_json(source, "adapter_config.json", {})
    if adapter or config.get("base_model_name_or_path"):
        raise ValueError(
            f"{str(source)!r} holds only what was trained, and transformers' LLaVA has no place for an adapter of "
            f"ours. Fold it into its base first: llava-lite merge {source} FOLDER. It stays loadable here as it is."
        )


def write_ours(source, folder, dtype, max_shard_size):
    """Write a folder of transformers' LLaVA as one of ours; return the source's own answers and what to tell."""
    expected = answers_of_stock(source, dtype)
    model, processor = load(source, device="cpu", dtype=dtype or "auto")
    # LLaVA's tools put -200 where a picture stands; the vocabulary may keep its `<image>`, which nobody writes then.
    model.config.image_token_index = processor.image_token_index = IMAGE_TOKEN_INDEX
    grew = (read_json(source, "config.json", {}).get(layout.RECORD) or {}).get("vocabulary")
    model.config.conv_template = processor.conv_template
    add_end_mark(model.generation_config, end_mark_of(processor.template(), processor.tokenizer), processor.tokenizer)
    if getattr(processor.image_processor, "do_pad", False):
        # LLaVA's tools pad as the config says, and so does this package; not twice.
        processor.image_processor.do_pad = False
        model.config.image_aspect_ratio = processor.image_aspect_ratio = "pad"
    if grew is not None:
        model.resize_token_embeddings(grew["num_rows"])
        model.config.pad_token_id = model.generation_config.pad_token_id = grew["pad_token_id"]
        processor.tokenizer = without_tokens(processor.tokenizer, grew)
        processor.chat_template = processor.tokenizer.chat_template
    notes = name_tower(model.config)
    for answer, mine in zip(expected, witness.readings(processor), strict=True):
        if mine and not torch.equal(answer.input_ids, witness.placed(mine["input_ids"], IMAGE_TOKEN_INDEX)):
            raise ValueError(
                "LLaVA reads the text behind a picture as a text of its own, which gives other ids with the tokenizer "
                f"of {source!r} than transformers' way. It stays loadable here as it is."
            )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    if grew is not None:
        path = Path(folder) / "tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": grew["tokenizer_class"]}
        write_json(path, {key: value for key, value in fields.items() if value is not None})
    return expected, notes


def name_tower(config):
    """Name the tower that LLaVA's own loader builds before it takes the weights; return a line if none is known."""
    if config.mm_vision_tower is not None:
        return []
    tower = config.vision_config
    config.mm_vision_tower = TOWERS.get((tower.model_type, tower.hidden_size, tower.patch_size, tower.image_size))
    if config.mm_vision_tower is None:
        return [
            "The tower is none of the usual ones; LLaVA's own code needs its name as mm_vision_tower, this does not."
        ]
    # The weights are in the folder and may have been trained.
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


def answers_of_ours(folder):
    """Return what a folder answers through this package, in float32."""
    model, processor = load(folder, device="cpu", dtype="float32")
    sees = model.get_vision_tower() is not None
    return witness.answers(model, witness.readings(processor, sees), processor.image_token_index)


def answers_of_stock(folder, dtype=None):
    """Return what a folder answers through transformers alone, in float32 of the weights as `dtype` holds them."""
    readable = generation_arguments(folder, AutoConfig.from_pretrained(folder), {}, {})
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto", **readable).eval().float()
    assert type(model).__module__.startswith("transformers."), type(model)
    processor = stock_processor(folder)
    said = witness.answers(model, witness.readings(processor), processor.image_token_id)
    del model
    gc.collect()
    return said


def stock_processor(folder):
    """Return transformers' processor of a folder, its pictures prepared with PIL.

    With torchvision it would choose its other backend, which resizes a little differently.
    """
    # From its own file: transformers 5.17 offers it at the top only where torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def main(argv=None):
    """Run `llava-lite convert`; errors are told in a line by llava_lite.cli."""
    convert(**vars(build_parser().parse_args(argv)))
    return 0
