"""Turn the two files of VQAv2 (Goyal et al. 2017), questions and annotations, into records.

A question names its image by number: `COCO_<data_subtype>_<12 digits>.jpg` unless --image_name is another pattern.
"""

import json
from collections.abc import Iterator

from llava_lite.data.converters.base import Found, Options, ask_about, numbered, pick_answers
from llava_lite.data.converters.items import get_texts, placed
from llava_lite.data.errors import DataError


def read_vqa(data: dict, where: str, options: Options) -> Iterator[Found]:
    """Yield each question that the file of annotations answers, with the chosen answers."""
    if options.annotations is None:
        raise DataError(
            f"{where} has the questions of a VQA data set; name the file of its answers: --annotations FILE. The "
            "questions of a test set have none and cannot be trained on."
        )
    answered = _get_answers(options.annotations)
    if options.image_name is None:
        subtype = data.get("data_subtype")
        if not isinstance(subtype, str):
            raise DataError(
                f"{where} has no data_subtype to name its images by; give a pattern for the number of an image: "
                "--image_name 'COCO_train2014_{:012d}.jpg'."
            )
        options.image_name = f"COCO_{subtype}_{{:012d}}.jpg"
        options.remarks.append(f"image names are {options.image_name!r}, by data_subtype; --image_name sets another")
    for position, question in enumerate(data["questions"]):
        place, number = f"{where}[{position}]", question.get("question_id")
        name = f"question {number!r} ({place})"
        try:
            if number not in answered:
                raise DataError(f"{name} has no answer in {options.annotations}.")
            texts = _chosen(answered.pop(number), options, name)
            image = placed(question["image_id"], options, name)
            for k, text in enumerate(texts):
                record_id = numbered(str(number), k, len(texts))
                yield Found(place, ask_about(image, question["question"], text, record_id))
        except (DataError, KeyError) as error:
            yield Found(place, None, str(error) if isinstance(error, DataError) else f"{name} has no {error}.")
    if answered:
        yield Found(where, None, f"{len(answered)} annotations whose question_id no question has.")


def _get_answers(path: str) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
        return {entry["question_id"]: entry for entry in data["annotations"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"--annotations {path}: no list 'annotations' of {{question_id, answers}} "
            f"({type(error).__name__}: {error})."
        ) from None


def _chosen(entry: dict, options: Options, name: str) -> list[str]:
    chosen = entry.get("multiple_choice_answer")
    listed = get_texts(entry.get("answers") or [], name)
    if options.answers == "majority" and isinstance(chosen, str):
        options.notes["answers not used (--answers majority)"] += len(set(listed) - {chosen})
        return [chosen]
    return pick_answers(listed or [chosen], options, name)
