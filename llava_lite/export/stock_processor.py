"""Turn our processor into transformers' own LLaVA processor, which reads the same messages as the same numbers."""

import copy
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken
from transformers import LlavaNextProcessor, LlavaProcessor

from llava_lite.chat_answers import own_template
from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.export import witness
from llava_lite.export.jinja_template import write_jinja
from llava_lite.formats import transformers_llava as layout

PAD_TOKEN = "<pad>"
MANY_BACKENDS = (
    "With torchvision installed, transformers prepares pictures with another backend, whose resizing differs by a "
    'little; AutoImageProcessor.from_pretrained(..., backend="pil") gives the pixels of training.'
)
WITHOUT_BOS = (
    "The tokenizer writes BOS and the chat template does not, as in the released llava-hf checkpoints. A server that "
    "tokenizes chats without special tokens, as vLLM does if not told otherwise, needs add_special_tokens: true."
)
TRANSPARENT = "transformers paints the transparent parts of a picture white; here they are shown in the colours below."


def with_image_token(tokenizer):
    """Return a tokenizer with `<image>` and a padding token, and the id of `<image>`."""
    tokenizer = copy.deepcopy(tokenizer)
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab():
        mark = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([mark], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer, tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


def stock_image_processor(processor, fields):
    """Return (image processor that prepares pictures as ours does, lines about it)."""
    image_processor = copy.deepcopy(processor.image_processor)
    notes = [MANY_BACKENDS, TRANSPARENT]
    if layout.is_anyres(fields):
        return next_image_processor(image_processor, fields), notes
    if processor.image_aspect_ratio != "pad":
        return image_processor, notes
    settings = image_processor.to_dict() | {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    settings["crop_size"] = settings.get("crop_size") or settings["size"]
    notes.append(
        "Pictures are padded to a square (image_aspect_ratio 'pad') by LlavaImageProcessor's do_pad. A reader that "
        "prepares pictures in another way, as transformers before 4.50 and its CLIPImageProcessor do, cuts their ends "
        "off."
    )
    return _image_processor_of(settings), notes


def next_image_processor(image_processor, fields):
    """Return LlavaNext's image processor with the settings of the tower's."""
    settings = image_processor.to_dict() | {"do_pad": True, "image_processor_type": "LlavaNextImageProcessor"}
    settings["image_grid_pinpoints"] = [[height, width] for width, height in fields["image_grid_pinpoints"]]
    return _image_processor_of(settings)


def _image_processor_of(settings):
    """Return the image processor that a preprocessor_config.json of these settings makes."""
    # From its own file: transformers 5.17 offers it at the top only where torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, backend="pil")


def stock_processor(processor, tokenizer, image_processor, fields, expected):
    """Return (transformers' processor that reads messages as ours does, lines about it); ValueError if none does."""
    tower = fields["vision_config"]
    make = LlavaNextProcessor if layout.is_anyres(fields) else LlavaProcessor
    has_own = getattr(processor.tokenizer, "chat_template", None) is not None
    choices = processor.enable_thinking, processor.chat_end_mark
    own = own_template(processor.tokenizer, *choices) if has_own else None
    for blank in (False, True):
        template = write_jinja(
            processor.conv_template,
            processor.use_im_start_end,
            own=own,
            blank_after_picture=blank,
            end_mark=processor.chat_end_mark,
        )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
        written = make(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=tower["patch_size"],
            vision_feature_select_strategy=layout.strategy(fields),
            num_additional_image_tokens=layout.CLASS_TOKENS[tower["model_type"]],
            chat_template=template,
        )
        wrong = first_unequal(expected, processor.image_token_index, written)
        if wrong is None:
            notes = [WITHOUT_BOS] if tokenizer.bos_token_id in tokenizer("")["input_ids"] else []
            note = (
                "The chat template writes a blank after `<image>`, which this tokenizer needs to read the text behind "
                "a picture as in training. Prompts written by hand should have it too."
            )
            return written, notes + ([note] if blank else [])
    raise ValueError(
        f"transformers' processor reads other ids than this package from the same messages: {wrong}. "
        f"Its chat template cannot write the format {processor.conv_template!r} for this tokenizer."
    )


def first_unequal(expected, image_token, written):
    """Return in words where a processor of transformers reads messages otherwise than expected, None if nowhere."""
    for mine, theirs in zip(expected, witness.readings(written), strict=True):
        if not mine:
            continue
        ours = witness.placed(mine["input_ids"], image_token).tolist()
        others = witness.placed(theirs["input_ids"], written.image_token_id).tolist()
        if ours != others:
            at = next((i for i, (a, b) in enumerate(zip(ours, others, strict=False)) if a != b), -1)
            parts = f"{ours[at : at + 4]} and {others[at : at + 4]}"
            return f"{len(ours)} and {len(others)} ids, from position {at} on {parts}"
    return None


def write_processor(processor, folder):
    """Write a processor for this version of transformers and for those that look for files of their own."""
    processor.save_pretrained(folder)
    folder = Path(folder)
    if not (folder / "preprocessor_config.json").exists():
        processor.image_processor.save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    # Names of one backend are unknown to versions before 5.
    settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    write_json(folder / "preprocessor_config.json", settings)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "backend")}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A batch is generated from rows padded on the left, and transformers' processor pads as its tokenizer does.
    config |= {"padding_side": "left", "chat_template": processor.chat_template}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path, fields):
    """Write a dict as JSON that a person can read."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
