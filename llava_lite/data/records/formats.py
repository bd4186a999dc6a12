"""Find the format of a record by its keys; read it as images and a conversation, or name the command to convert it.

A new format is one line in FORMATS. Sources: the data pages of LLaVA, LLaMA-Factory, ms-swift, TRL,
The Cauldron and FineVision, OBELICS, MMC4 and PixMo.
"""

from collections.abc import Callable
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation import join_input
from llava_lite.conversation.layout import put_images_first
from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.keys import IMAGE_KEYS, media_keys
from llava_lite.data.records.media import MediaMix, find_media
from llava_lite.data.records.turns import Dialogue, check_text, read_dialogue

CONVERSATION_KEYS = ("conversations", "conversation", "messages")
CAPTION_KEYS = ("caption", "text", "txt")
ANSWER_KEYS = ("answer", "answers", "multiple_choice_answer")


class ForeignRecord(DataError):
    """A record of a format that is not read directly.

    options: of the command that converts it, None if nothing does; reason: then why.
    """

    def __init__(self, message, format_name="", options=None, reason=""):
        super().__init__(message)
        self.format_name, self.options, self.reason = format_name, options, reason

    def __reduce__(self):
        """Pickle all fields, for other processes."""
        return type(self), (str(self), self.format_name, self.options, self.reason)


class Content(NamedTuple):
    """The content of a record: its images, its conversation, and the keys that they were read from."""

    images: tuple[str | bytes | MediaMix, ...]
    dialogue: Dialogue
    keys: tuple[str, ...]


class RecordFormat(NamedTuple):
    """matches: object -> bool. read: object, its images, name -> Content; None if only a conversion reads it.

    options: of the command that converts it, with KEY for the key of the images and NAME for the object's first key;
    None if nothing converts it; reason: then why.
    """

    matches: Callable[[dict], bool]
    read: Callable[[dict, tuple, str], Content] | None = None
    options: str | None = None
    reason: str = ""


def _is_list_with(value, *kinds) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, kinds) for one in value)


def _has_conversation(item: dict) -> bool:
    # PixMo's `messages` are texts.
    return any(key in item and not (key == "messages" and _is_list_with(item[key], str)) for key in CONVERSATION_KEYS)


def _conversation(item: dict, images: tuple, name: str) -> Content:
    keys = [key for key in CONVERSATION_KEYS if key in item]
    if len(keys) > 1:
        raise DataError(f"{name} has {' and '.join(map(repr, keys))}; only one conversation is read. Drop the others.")
    dialogue = read_dialogue(item[keys[0]], keys[0], name)
    if keys[0] == "messages" and dialogue.turns and dialogue.turns[0][0] == "gpt":
        raise DataError(f"{name}: 'messages' begin with an answer; expected a question of the user.")
    return Content(images, dialogue, tuple(keys))


def _cauldron(item: dict, images: tuple, name: str) -> Content:
    """Read {images, texts: [{user, assistant}]}: all images come before the first question."""
    dialogue = read_dialogue([{key: pair.get(key) for key in ("user", "assistant")} for pair in item["texts"]],
                             "texts", name)  # fmt: skip
    if any(DEFAULT_IMAGE_TOKEN in text for _, text in dialogue.turns):
        raise DataError(
            f"{name}: 'texts' have {DEFAULT_IMAGE_TOKEN}, but the images of this format have no placeholders: remove "
            "it from the text."
        )
    return Content(images, images_first(dialogue, len(images)), ("texts",))


def _prompt_and_completion(item: dict, images: tuple, name: str) -> Content:
    """Read TRL's {prompt, completion}: answers in the prompt are context and not supervised."""
    prompt = _as_messages(item["prompt"], "user", "prompt", name)
    completion = _as_messages(item["completion"], "assistant", "completion", name)
    context = read_dialogue(prompt, "prompt", name)
    dialogue = read_dialogue([*prompt, *completion], "completion", name)
    answers = (i for i, (role, _) in enumerate(context.turns) if role == "gpt")
    dialogue = dialogue._replace(not_supervised=dialogue.not_supervised | frozenset(answers))
    if images and not dialogue.images and not any(DEFAULT_IMAGE_TOKEN in text for _, text in dialogue.turns):
        # As in TRL for prompts that are texts.
        dialogue = images_first(dialogue, len(images))
    return Content(images, dialogue, ("prompt", "completion"))


def _alpaca(item: dict, images: tuple, name: str) -> Content:
    """Read {instruction, input, output}: the input follows its instruction as Alpaca's prompts write it.

    Images come first, unless the instruction has their placeholders (LLaMA2-Accessory).
    """
    texts = {}
    for key in ("instruction", "input", "output"):
        texts[key] = item.get(key, "" if key == "input" else None)
        if not isinstance(texts[key], str):
            raise DataError(f"{name}: {key!r} is {describe(texts[key])}, expected a string.")
    question = check_text(join_input(texts["instruction"], texts["input"]), name)
    dialogue = Dialogue((("human", question), ("gpt", check_text(texts["output"], name))))
    if DEFAULT_IMAGE_TOKEN not in question:
        dialogue = images_first(dialogue, len(images))
    return Content(images, dialogue, ("instruction", "input", "output"))


def _as_messages(value, role: str, key: str, name: str) -> list:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise DataError(f"{name}: {key!r} is {describe(value)}, expected a text or a list of messages.")


def images_first(dialogue: Dialogue, count: int) -> Dialogue:
    """Return the conversation with `count` image placeholders before its first question, a line each."""
    if not count or not dialogue.turns:
        return dialogue
    role, text = dialogue.turns[0]
    first = (role, put_images_first(text, count))
    return dialogue._replace(turns=(first, *dialogue.turns[1:]))


def caption_key(item: dict) -> str | None:
    """Return the key of a caption."""
    return next((key for key in CAPTION_KEYS if item.get(key) is not None), None)


def captions_key(item: dict) -> str | None:
    """Return the key of a list of captions."""
    keys = ("captions", "sentences", *CAPTION_KEYS)
    return next((key for key in keys if _is_list_with(item.get(key), str, dict)), None)


def _caption(item: dict, images: tuple, name: str) -> Content:
    """Read {image, caption}: the image is the question, the caption its answer."""
    keys = [key for key in CAPTION_KEYS if key in item]
    caption = item[keys[0]]
    if len({str(item[key]) for key in keys}) > 1:
        raise DataError(f"{name} has {' and '.join(map(repr, keys))}, which differ; keep the one that is the caption.")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{name}: the caption is empty or not a text.")
    if len(images) != 1:
        raise DataError(f"{name}: {len(images)} images and a caption; expected one image.")
    turns = (("human", DEFAULT_IMAGE_TOKEN), ("gpt", check_text(caption.strip(), name)))
    return Content(images, Dialogue(turns), tuple(keys))


def _url_and_caption(item: dict, images: tuple, name: str) -> Content:
    """Read {url, caption} of LLaMA-Adapter, whose url is the path of a local image."""
    content = _caption(item, (item["url"],), name)
    return content._replace(keys=("url", *content.keys))


def _has_url_and_caption(item: dict) -> bool:
    has_url = isinstance(item.get("url"), str) and bool(item["url"])
    if not has_url or _has_image(item) or "caption" not in item or not _has_caption(item):
        return False
    return not media_keys({key: value for key, value in item.items() if key != "url"})


def _has_image(item: dict) -> bool:
    return any(item.get(key) for key in IMAGE_KEYS) or bool(find_media(item))


def _has_caption(item: dict) -> bool:
    is_one = caption_key(item) is not None and captions_key(item) is None
    return is_one and not any(key in item for key in ("question", "instruction", "query"))


def _is_table_with(item: dict, *keys: str) -> bool:
    """Return whether all values are objects with one of the keys, as in configuration files of data sets."""
    return bool(item) and all(isinstance(value, dict) and any(key in value for key in keys) for value in item.values())


FORMATS: dict[str, RecordFormat] = {
    "a conversation": RecordFormat(_has_conversation, _conversation),
    "MMC4": RecordFormat(
        lambda item: "text_list" in item and "image_info" in item,
        reason="it interleaves images with text and has no questions and answers, and its images are not in it",
    ),
    "OBELICS": RecordFormat(
        lambda item: _is_list_with(item.get("texts"), str, type(None)) and isinstance(item.get("images"), list),
        reason="it interleaves images with text and has no questions and answers",
    ),
    "The Cauldron or FineVision": RecordFormat(lambda item: _is_list_with(item.get("texts"), dict), _cauldron),
    "prompt and completion": RecordFormat(
        lambda item: "prompt" in item and "completion" in item, _prompt_and_completion
    ),
    "Alpaca": RecordFormat(
        lambda item: "instruction" in item and "output" in item and not item.get("history"), _alpaca
    ),
    "Alpaca with a history": RecordFormat(
        lambda item: "instruction" in item and "output" in item and bool(item.get("history")), options=""
    ),
    "query and response": RecordFormat(lambda item: "query" in item and "response" in item, options=""),
    "question and answer": RecordFormat(
        lambda item: "question" in item and any(key in item for key in ANSWER_KEYS), options=""
    ),
    "COCO captions": RecordFormat(
        lambda item: isinstance(item.get("images"), list) and isinstance(item.get("annotations"), list),
        options="--answers first",
    ),
    "VQA questions": RecordFormat(
        lambda item: _is_list_with(item.get("questions"), dict),
        options="--annotations ANSWERS.json --answers majority",
    ),
    "VQA answers": RecordFormat(
        lambda item: _is_list_with(item.get("annotations"), dict) and "answers" in item["annotations"][0],
        reason="name the file of its questions to llava-lite data convert, and this one with --annotations",
    ),
    "InternVL meta": RecordFormat(lambda item: _is_table_with(item, "annotation"), options=""),
    "LLaMA-Factory dataset_info": RecordFormat(
        lambda item: _is_table_with(item, "file_name", "hf_hub_url", "ms_hub_url", "script_url"),
        options="--dataset NAME",
    ),
    "an image and its caption": RecordFormat(lambda item: _has_image(item) and _has_caption(item), _caption),
    "a url and its caption": RecordFormat(_has_url_and_caption, _url_and_caption),
    "an image and its captions": RecordFormat(
        lambda item: captions_key(item) is not None and (_has_image(item) or bool(media_keys(item))),
        options="--answers first",
    ),
    "an image and its caption, the image under another key": RecordFormat(
        lambda item: (
            not (_has_image(item) or _has_url_and_caption(item)) and bool(media_keys(item)) and _has_caption(item)
        ),
        options="--image_key KEY",
    ),
}


def get_formats(item: dict) -> list[str]:
    """Return the names of the formats whose keys an object without null values has."""
    found = [name for name, one in FORMATS.items() if one.matches(item)]
    # A caption beside a conversation is ignored; a conversation beside any other format is ambiguous.
    captions = [name for name in found if "caption" in name and name != "COCO captions"]
    return [name for name in found if name not in captions] or captions
