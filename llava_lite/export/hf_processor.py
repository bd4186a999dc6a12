"""Turn our processor into transformers' own LLaVA processor, which reads the same messages as the same numbers."""

import copy
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken
from transformers import LlavaNextProcessor, LlavaProcessor

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.chat_answers import own_template
from llava_lite.export import verify
from llava_lite.export.jinja import write_jinja
from llava_lite.formats import hf_llava as layout

PAD_TOKEN = "<pad>"
MANY_BACKENDS = (
    "With torchvision installed, transformers prepares images with another backend, whose resizing differs by a "
    'little; AutoImageProcessor.from_pretrained(..., backend="pil") gives the pixels of training.'
)
WITHOUT_BOS = (
    "The tokenizer writes BOS and the chat template does not, as in the released llava-hf checkpoints. A server that "
    "tokenizes chats without special tokens, as vLLM does by default, needs add_special_tokens: true."
)
TRANSPARENT = "transformers paints the transparent parts of an image white; here they are shown in the colours below."


def with_image_token(tokenizer):
    """Return a tokenizer with `<image>` and a padding token, and the id of `<image>`."""
    tokenizer = copy.deepcopy(tokenizer)
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab():
        token = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer, tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


def hf_image_processor(processor, fields):
    """Return (image processor that prepares images as ours does, lines about it)."""
    notes, settings = [MANY_BACKENDS, TRANSPARENT], processor.image_processor.to_dict() | {"do_pad": True}
    if layout.is_anyres(fields):
        pinpoints = [[height, width] for width, height in fields["image_grid_pinpoints"]]
        settings |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints}
        return _get_image_processor(settings), notes
    if processor.image_aspect_ratio != "pad":
        return copy.deepcopy(processor.image_processor), notes
    settings["image_processor_type"] = "LlavaImageProcessor"
    settings["crop_size"] = settings.get("crop_size") or settings["size"]
    notes.append(
        "Images are padded to a square (image_aspect_ratio 'pad') by LlavaImageProcessor's do_pad. A reader that "
        "prepares images in another way, as transformers before 4.50 and its CLIPImageProcessor do, cuts their ends "
        "off."
    )
    return _get_image_processor(settings), notes


def _get_image_processor(settings):
    """Return the image processor that a preprocessor_config.json of these settings makes."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return open_pil_processor(directory)


def open_pil_processor(directory):
    """Return the image processor of a directory that resizes with PIL."""
    # From its own file: transformers 5.17 offers it at the top only where torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)


def hf_processor(processor, tokenizer, image_processor, fields, expected):
    """Return (transformers' processor that reads messages as ours does, lines about it); ValueError if none does."""
    tower = fields["vision_config"]
    make = LlavaNextProcessor if layout.is_anyres(fields) else LlavaProcessor
    has_own = getattr(processor.tokenizer, "chat_template", None) is not None
    options = processor.enable_thinking, processor.chat_end_token
    own = own_template(processor.tokenizer, *options) if has_own else None
    for space in (False, True):
        template = write_jinja(
            processor.conv_template,
            processor.use_im_start_end,
            own=own,
            space_after_image=space,
            end_token=processor.chat_end_token,
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
                "The chat template writes a space after `<image>`, which this tokenizer needs to read the text after "
                "an image as in training. Prompts written by hand should have it too."
            )
            return written, notes + ([note] if space else [])
    raise ValueError(
        f"transformers' processor reads other ids than this package from the same messages: {wrong}. "
        f"Its chat template cannot write the format {processor.conv_template!r} for this tokenizer."
    )


def first_unequal(expected, image_token, written):
    """Describe the first ids that transformers' processor reads differently from the expected; None if all agree."""
    for mine, theirs in zip(expected, verify.readings(written), strict=True):
        if not mine:
            continue
        ours = verify.placed(mine["input_ids"], image_token).tolist()
        others = verify.placed(theirs["input_ids"], written.image_token_id).tolist()
        if ours != others:
            at = next((i for i, (a, b) in enumerate(zip(ours, others, strict=False)) if a != b), -1)
            parts = f"{ours[at : at + 4]} and {others[at : at + 4]}"
            return f"{len(ours)} and {len(others)} ids, from position {at} on {parts}"
    return None


def write_processor(processor, directory):
    """Write a processor for this version of transformers and for those that look for files of their own."""
    processor.save_pretrained(directory)
    directory = Path(directory)
    if not (directory / "preprocessor_config.json").exists():
        processor.image_processor.save_pretrained(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text(encoding="utf-8"))
    # Names of one backend are unknown to versions before 5.
    settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    write_json(directory / "preprocessor_config.json", settings)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "backend")}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Generation needs sequences padded on the left, and transformers' processor pads as its tokenizer does.
    config |= {"padding_side": "left", "chat_template": processor.chat_template}
    write_json(directory / "tokenizer_config.json", config)


def write_json(path, fields):
    """Write a dict as JSON that a person can read."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
