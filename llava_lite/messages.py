"""Deal pictures and words to prompts: from role-and-content messages, and from lists in any of their shapes."""

import base64
import io
import os
from http.client import HTTPException
from urllib.request import Request, urlopen

from PIL import Image, ImageOps

from llava_lite import __version__
from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.mm_utils import PictureError, open_picture, to_rgb

# What begins an address and no path; how long to wait for what it names.
ADDRESSES = ("http://", "https://", "data:image/")
TIMEOUT_S = 30


def pictures_of_each(images, texts):
    """Return one list of upright RGB pictures for each text, as many as its marks.

    images: None, a picture, a flat list in the order of the marks, or one list (or None) for each text.
    """
    counts = [text.count(DEFAULT_IMAGE_TOKEN) for text in texts]
    groups = _grouped(images, counts)
    for text, count, group in zip(texts, counts, groups, strict=True):
        if count != len(group):
            raise ValueError(
                f"{count} {DEFAULT_IMAGE_TOKEN} marks but {len(group)} pictures in {_shortened(text)!r}. "
                f"{'Remove a mark or add a picture.' if count > len(group) else 'Add a mark or remove a picture.'}"
            )
    return [[upright_picture(picture) for picture in group] for group in groups]


def upright_picture(picture):
    """Return a picture as RGB, turned as its EXIF entry says: a PIL one, the path, address or bytes of a file."""
    if isinstance(picture, Image.Image):
        return to_rgb(ImageOps.exif_transpose(picture))
    if isinstance(picture, str) and picture.startswith(ADDRESSES):
        picture = fetch(picture)
    if not isinstance(picture, (str, os.PathLike, bytes)) and not hasattr(picture, "read"):
        raise TypeError(
            f"a picture is a PIL image, a path, an open file or the bytes of one; got {type(picture).__name__}. "
            "PIL.Image.fromarray makes a picture of an array."
        )
    if not isinstance(picture, bytes):
        return open_picture(picture, upright=True)
    try:
        return open_picture(io.BytesIO(picture), upright=True)
    except PictureError as error:
        raise PictureError(f"{len(picture)} bytes", error.reason) from error


def fetch(address):
    """Return the bytes that an address of the web, or a data: address itself, holds; PictureError if it has none."""
    shown = _shortened(address) if address.startswith("http") else f"{address[:40]}..."
    if address.startswith("data:"):
        try:
            return base64.b64decode(address.partition(",")[2], validate=True)
        except ValueError as error:
            raise PictureError(shown, f"no base64: {error}") from error
    # Some servers, Wikipedia's among them, answer nobody without a name.
    request = Request(address, headers={"User-Agent": f"llava_lite/{__version__}"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise PictureError(shown, f"{type(error).__name__}: {error}") from error


def _grouped(images, counts):
    """Deal pictures to texts: as they were grouped by the caller, else by the number of marks."""
    if images is None:
        return [[] for _ in counts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(group is None or isinstance(group, (list, tuple)) for group in images):
        if len(images) != len(counts):
            raise ValueError(f"{len(images)} lists of pictures for {len(counts)} texts; give one list for each text.")
        return [as_list(group) for group in images]
    if len(images) != sum(counts):
        raise ValueError(
            f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} marks in {len(counts)} texts but {len(images)} pictures. "
            "Each mark needs a picture and each picture a mark."
        )
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in counts]


def _shortened(text, longest=80):
    return text if len(text) <= longest else f"...{text[-longest:]}"


def as_list(pictures):
    """Return the pictures of one text as a list: None is no picture, a single one a list of one."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def read_messages(messages, need_pictures=True):
    """Return (turns, system, pictures) of a list of role-and-content messages.

    need_pictures: False takes an image part without a picture for a mark, whose picture comes another way.
    """
    turns, system, pictures = [], None, []
    for message in messages:
        text, found = _read_content(message["content"], need_pictures)
        pictures += found
        role = message["role"]
        if role == "system" and not turns and system is None:
            system = text
        elif role == "user" and (not turns or turns[-1][1] is not None):
            turns.append((text, None))
        elif role == "assistant" and turns and turns[-1][1] is None:
            turns[-1] = (turns[-1][0], text)
        else:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"messages must go (system,) user, assistant, user, ...; got {roles}.")
    if not turns:
        raise ValueError("a conversation needs at least one message of the user.")
    return turns, system, pictures


def in_parts(conversation):
    """Return messages, or lists of messages, with every text as a part: some templates read nothing else.

    A picture given as base64 text becomes one given by its address, data:..., since a bare text is read as a path.
    """
    if not isinstance(conversation[0], dict):
        return [in_parts(messages) for messages in conversation]
    return [{**message, "content": _parts(message["content"])} for message in conversation]


def _parts(content):
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_by_address(part) if "base64" in part else part for part in content]


def _by_address(part):
    return {"type": "image", "url": f"data:image/png;base64,{part['base64']}"}


def _read_content(content, need_pictures):
    """Return the text of a message, with a mark where a picture stands, and its pictures."""
    if isinstance(content, str):
        return content, []
    words, pictures = [], []
    for part in content:
        if part["type"] == "text":
            words.append(part["text"])
        elif part["type"] in ("image", "image_url"):
            words.append(DEFAULT_IMAGE_TOKEN)
            pictures += [_picture_of(part)] if need_pictures else []
        else:
            raise ValueError(f"a message has a part of type {part['type']!r}; known: text, image, image_url.")
    return "\n".join(words), pictures


def _picture_of(part):
    """Return the picture of a message's part: as it stands, or the bytes that its base64 text holds.

    An `image_url` is OpenAI's way to write it: {"type": "image_url", "image_url": {"url": ...}}.
    """
    if part["type"] == "image_url":
        address = part.get("image_url")
        part = {"url": address.get("url") if isinstance(address, dict) else address}
    found = [key for key in ("image", "path", "url", "base64") if part.get(key) is not None]
    if not found:
        raise ValueError(f"an image part needs one of image, path, url, base64; got {', '.join(part)}.")
    return base64.b64decode(part["base64"]) if found[0] == "base64" else part[found[0]]
