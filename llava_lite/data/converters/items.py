"""Turn an object with a question and its answer (Alpaca, query/response, VQA, captions) into records.

LLaMA-Factory joins instruction and input by a newline and puts the history before them; ms-swift does the same
with query and response. VizWiz and VQA list several answers, as texts or as {"answer": ...}.
"""

from collections.abc import Iterator

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.images import put_images_first
from llava_lite.data.converters.base import Options, numbered, pick_answers
from llava_lite.data.errors import DataError
from llava_lite.data.records.content import without_nulls
from llava_lite.data.records.formats import CONVERSATION_KEYS, FORMATS, captions_key, get_formats
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.keys import IMAGE_KEYS
from llava_lite.data.records.media import count_images, find_media
from llava_lite.data.records.parts import IMAGE_PARTS

ALPACA = ("Alpaca", "Alpaca with a history")
QUERY, QUESTION, CAPTIONS = "query and response", "question and answer", "an image and its captions"


def convert_item(item, where: str, options: Options) -> Iterator[dict]:
    """Yield the records of one object, in LLaVA's spelling or one that parse_record reads as well.

    where: its file and position. Raises DataError for an ambiguous object, or one that is not a record.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {describe(item)}, expected an object.")
    item = item if item.get("id") is not None else item | {"id": where}
    name = f"record {item['id']!r} ({where})"
    item = {key: value for key, value in without_nulls(item).items() if key not in (options.drop or ())}
    item = with_image_key(item, options, name)
    found = get_formats(item)
    if found == [CAPTIONS]:
        key = captions_key(item)
        yield from _with_answers(item, "", get_texts(item[key], name), (key,), "captions", name, options)
    elif len(found) == 1 and found[0] in ALPACA:
        asked = _joined(_text(item, "instruction", name), item.get("input"))
        yield _pairs(item, asked, _text(item, "output", name), ("instruction", "input", "output"), name, options)
    elif found == [QUERY]:
        asked, answer = _text(item, "query", name), _text(item, "response", name)
        yield _pairs(item, asked, answer, ("query", "response"), name, options)
    elif found == [QUESTION]:
        keys = [key for key in ("answer", "multiple_choice_answer", "answers") if key in item]
        asked, answers = _text(item, "question", name), _answers(item, keys, options, name)
        yield from _with_answers(item, asked, answers, ("question", *keys), "answers", name, options)
    elif found and FORMATS[found[0]].read is None and FORMATS[found[0]].options is None:
        raise DataError(f"{name} is of the format {found[0]!r}, which is not supported: {FORMATS[found[0]].reason}.")
    else:
        yield images_in_front(item, options)


def with_image_key(item: dict, options: Options, name: str) -> dict:
    """Return the object with the images of --image_key under `images`, and their paths by `placed`."""
    keys = [key for key in options.image_key or () if item.get(key) is not None and key not in IMAGE_KEYS]
    if keys:
        if any(item.get(other) for other in IMAGE_KEYS):
            raise DataError(f"{name} has images under 'image' or 'images' as well as under {keys} (--image_key).")
        values = [one for key in keys for one in (item[key] if isinstance(item[key], list) else [item[key]])]
        item = {key: value for key, value in item.items() if key not in (*keys, *IMAGE_KEYS)}
        item["images"] = values if len(values) > 1 else values[0]
    for own in IMAGE_KEYS:
        if own in item:
            item = item | {own: placed(item[own], options, name)}
    media = {key: item[key] for key in find_media(item) if isinstance(item[key], str)}
    return item | {key: options.image_prefix + path for key, path in media.items()}


def placed(value, options: Options, name: str):
    """Return the value of an image key with --image_name and --image_prefix applied to it."""
    if isinstance(value, list):
        return [placed(one, options, name) for one in value]
    if options.image_name is not None and isinstance(value, (str, int)):
        try:
            value = options.image_name.format(value)
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(
                f"{name}: --image_name {options.image_name!r} does not fit {describe(value)} ({error})."
            ) from None
    return options.image_prefix + value if isinstance(value, str) else value


def images_in_front(item: dict, options: Options) -> dict:
    """Return the object with --images_first applied: placeholders before the first question, if there are none."""
    count = count_images(item)
    key = next((key for key in CONVERSATION_KEYS if isinstance(item.get(key), list)), None)
    if not options.images_first or not count or key is None or _has_placeholder(item[key]):
        return item
    turns, done = [], False
    for turn in item[key]:
        role = isinstance(turn, dict) and str(turn.get("from") or turn.get("role")).lower()
        text = next((part for part in ("value", "content") if isinstance(turn, dict) and part in turn), None)
        if not done and role in ("human", "user") and isinstance(turn.get(text), (str, list)):
            old = turn[text]
            if isinstance(old, str):
                new = put_images_first(old, count)
            else:
                new = [{"type": "text", "text": put_images_first("", count)}, *old]
            turn, done = turn | {text: new}, True
        turns.append(turn)
    options.notes["records whose images were put before the first question (--images_first)"] += done
    return item | {key: turns}


def _has_placeholder(turns: list) -> bool:
    """Return whether a conversation has an image placeholder or an image part."""
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    is_part = any(part.get("type") in IMAGE_PARTS or "image" in part for part in parts)
    return is_part or DEFAULT_IMAGE_TOKEN in str(turns)


def _joined(instruction: str, more) -> str:
    return f"{instruction}\n{more}" if isinstance(more, str) and more.strip() else instruction


def _text(item: dict, key: str, name: str) -> str:
    if not isinstance(item.get(key), str):
        raise DataError(f"{name}: {key!r} is {describe(item.get(key))}, expected a string.")
    return item[key]


def get_texts(values: list, name: str) -> list[str]:
    """Return the texts of a list of texts, or of objects such as {"answer": ...} and {"raw": ...}."""
    texts = []
    for value in values:
        if isinstance(value, dict):
            value = next((value[key] for key in ("answer", "caption", "raw", "text") if key in value), value)
        if not isinstance(value, str):
            raise DataError(f"{name}: an answer is {describe(value)}, expected a string.")
        texts.append(value)
    return texts


def _answers(item: dict, keys: list[str], options: Options, name: str) -> list[str]:
    """Return the answers of a VQA record: only the one that the data set chose, except for --answers all."""
    if "answers" not in keys:
        return [_text(item, keys[0], name)]
    chosen = next((key for key in keys if key != "answers" and isinstance(item[key], str)), None)
    listed = item["answers"] if isinstance(item["answers"], list) else [item["answers"]]
    if chosen is not None and options.answers in (None, "majority"):
        options.notes[f"answers not used ({chosen} is the answer)"] += len(set(map(str, listed)) - {item[chosen]})
        return [item[chosen]]
    return get_texts(listed, name)


def _with_answers(item, question, answers, keys, what, name, options) -> Iterator[dict]:
    taken = pick_answers(answers, options, name, what)
    if not taken:
        raise DataError(f"{name} has no {what}.")
    for k, answer in enumerate(taken):
        one = item | {"id": numbered(item["id"], k, len(taken))} if len(taken) > 1 else item
        asked = question or options.question
        yield _pairs(one, asked, answer, keys, name, options)


def _pairs(item: dict, question: str, answer: str, keys, name: str, options: Options) -> dict:
    """Return the record of a question and its answer, after the pairs of its history."""
    turns = []
    for pair in item.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"{name}: 'history' holds {describe(pair)}, expected pairs of question and answer.")
        turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    count = count_images(item)
    if count and not any(DEFAULT_IMAGE_TOKEN in str(turn["value"]) for turn in turns):
        first = put_images_first(str(turns[0]["value"]), count)
        turns[0] = turns[0] | {"value": first.rstrip("\n") if not turns[0]["value"] else first}
    # PixMo has the same content again, as one text under `messages`.
    left = {key: value for key, value in item.items() if key not in (*keys, "history", *CONVERSATION_KEYS)}
    return left | {"conversations": turns}
