"""Turn the captions of COCO (Chen et al. 2015) into records: {images: [{id, file_name}], annotations: [...]}.

The five captions of an image are five records, or one of them, as --answers says.
"""

from collections.abc import Iterator

from llava_lite.data.converters.base import Found, Options, ask_about, numbered, pick_answers
from llava_lite.data.converters.items import placed
from llava_lite.data.errors import DataError


def read_coco(data: dict, where: str, options: Options) -> Iterator[Found]:
    """Yield the captions of each image, in the order of the images."""
    captions = {}
    for position, entry in enumerate(data["annotations"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise DataError(
                f"{where}: annotation {position} has no 'caption'; this may be a file of instances or "
                "keypoints, not of captions."
            )
        captions.setdefault(entry.get("image_id"), []).append(entry["caption"].strip())
    for position, image in enumerate(data["images"]):
        place = f"{where}[{position}]"
        name = f"image {image.get('id')!r} ({place})"
        try:
            if not isinstance(image.get("file_name"), str):
                raise DataError(f"{name} has no 'file_name'.")
            texts = pick_answers(captions.pop(image.get("id"), []), options, name, "captions")
            if not texts:
                raise DataError(f"{name} has no caption.")
            path = placed(image["file_name"], options, name)
            for k, text in enumerate(texts):
                yield Found(place, ask_about(path, options.question, text, numbered(str(image["id"]), k, len(texts))))
        except DataError as error:
            yield Found(place, None, str(error))
    for image_id, texts in captions.items():
        yield Found(where, None, f"{len(texts)} captions of image {image_id!r}, which 'images' does not list.")
