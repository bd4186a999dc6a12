"""Turn an object that names a question and its answer (Alpaca, query/response, VQA, captions) into records.

Facts: LLaMA-Factory joins instruction and input by a newline and puts the history in front; ms-swift does the same
with query and response. VizWiz and VQA list several answers, as texts or as {"answer": ...}.
"""

from collections.abc import Iterator

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.converters.base import Options, numbered, pick_answers
from llava_lite.data.image_values import describe
from llava_lite.data.parts import IMAGE_PARTS
from llava_lite.data.record_content import without_nulls
from llava_lite.data.record_formats import CONVERSATION_KEYS, FORMATS, captions_key, formats_of
from llava_lite.data.record_keys import IMAGE_KEYS
from llava_lite.data.scan import DataError

ALPACA, QUERY, QUESTION, CAPTIONS = "Alpaca", "query and response", "question and answer", "an image and its captions"


def convert_item(item, where: str, options: Options) -> Iterator[dict]:
    """Yield the records of one object, in LLaVA's spelling or one that parse_record reads as well.

    where: its file and position. Raises DataError for what is ambiguous or no record.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {describe(item)}, expected an object.")
    item = item if item.get("id") is not None else item | {"id": where}
    name = f"record {item['id']!r} ({where})"
    item = {key: value for key, value in without_nulls(item).items() if key not in (options.drop or ())}
    item = with_image_key(item, options, name)
    found = formats_of(item)
    if found == [CAPTIONS]:
        key = captions_key(item)
        yield from _with_answers(item, "", texts_of(item[key], name), (key,), "captions", name, options)
    elif found == [ALPACA]:
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
    """Return the object with its images under `image`, where --image_key says where they are."""
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
    return item


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
    """Return the object with its images in front of its first question, if that is asked for and none has a place."""
    images = next((item[key] for key in IMAGE_KEYS if item.get(key)), None)
    key = next((key for key in CONVERSATION_KEYS if isinstance(item.get(key), list)), None)
    if not options.images_first or images is None or key is None or _has_place(item[key]):
        return item
    marks = f"{DEFAULT_IMAGE_TOKEN}\n" * (len(images) if isinstance(images, list) else 1)
    turns, done = [], False
    for turn in item[key]:
        said = isinstance(turn, dict) and str(turn.get("from") or turn.get("role")).lower()
        text = next((part for part in ("value", "content") if isinstance(turn, dict) and part in turn), None)
        if not done and said in ("human", "user") and isinstance(turn.get(text), (str, list)):
            old = turn[text]
            new = marks + old if isinstance(old, str) else [{"type": "text", "text": marks}, *old]
            turn, done = turn | {text: new}, True
        turns.append(turn)
    options.notes["records whose images were put in front of the first question (--images_first)"] += done
    return item | {key: turns}


def _has_place(turns: list) -> bool:
    """Say whether a conversation says where an image stands, by a placeholder or a part."""
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


def texts_of(values: list, name: str) -> list[str]:
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
    """Return the answers of a VQA record. One that the data set itself chose is the answer, but for `all`."""
    if "answers" not in keys:
        return [_text(item, keys[0], name)]
    chosen = next((key for key in keys if key != "answers" and isinstance(item[key], str)), None)
    listed = item["answers"] if isinstance(item["answers"], list) else [item["answers"]]
    if chosen is not None and options.answers in (None, "majority"):
        options.notes[f"answers not taken ({chosen} is the answer)"] += len(set(map(str, listed)) - {item[chosen]})
        return [item[chosen]]
    return texts_of(listed, name)


def _with_answers(item, question, answers, keys, what, name, options) -> Iterator[dict]:
    taken = pick_answers(answers, options, name, what)
    if not taken:
        raise DataError(f"{name} has no {what}.")
    for k, answer in enumerate(taken):
        one = item | {"id": numbered(item["id"], k, len(taken))} if len(taken) > 1 else item
        asked = question or options.question
        yield _pairs(one, asked, answer, keys, name, options)


def _pairs(item: dict, question: str, answer: str, keys, name: str, options: Options) -> dict:
    """Return the record of a question and its answer, behind the pairs of the history."""
    turns = []
    for pair in item.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"{name}: 'history' holds {describe(pair)}, expected pairs of question and answer.")
        turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    images = next((item[key] for key in IMAGE_KEYS if item.get(key)), None)
    if images is not None and not any(DEFAULT_IMAGE_TOKEN in str(turn["value"]) for turn in turns):
        count = len(images) if isinstance(images, list) else 1
        first = f"{DEFAULT_IMAGE_TOKEN}\n" * count + str(turns[0]["value"])
        turns[0] = turns[0] | {"value": first.rstrip("\n") if not turns[0]["value"] else first}
    # PixMo says the same once more, as one text under `messages`.
    left = {key: value for key, value in item.items() if key not in (*keys, "history", *CONVERSATION_KEYS)}
    return left | {"conversations": turns}
