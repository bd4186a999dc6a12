"""Every spelling of an image in a record is the same image, and what is none is refused with the record's name."""

import base64
import io

import pytest
from PIL import Image
from toy_shards import image_bytes

from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import read_images

PNG = image_bytes(1)
TEXT = base64.b64encode(PNG).decode()


def in_format(name):
    """Return the bytes of an image in a format, and its base64 text."""
    file = io.BytesIO()
    Image.open(io.BytesIO(PNG)).save(file, name)
    return file.getvalue(), base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ([], ()),
        ({"bytes": None, "path": None}, ()),
        ("coco/1.jpg", ("coco/1.jpg",)),
        (["a.jpg", "b.png"], ("a.jpg", "b.png")),
        (("a.jpg",), ("a.jpg",)),
        (PNG, (PNG,)),
        (bytearray(PNG), (PNG,)),
        ([PNG, "a.jpg"], (PNG, "a.jpg")),
        ({"bytes": PNG, "path": None}, (PNG,)),
        ({"bytes": PNG, "path": "else.jpg"}, (PNG,)),
        ({"bytes": None, "path": "a.jpg"}, ("a.jpg",)),
        ({"bytes": TEXT, "path": None}, (PNG,)),
        ([{"bytes": PNG}, {"path": "a.jpg"}], (PNG, "a.jpg")),
        ({"url": "a.jpg", "detail": "low"}, ("a.jpg",)),
        ({"base64": TEXT}, (PNG,)),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXT}}, (PNG,)),
        ({"type": "image", "source": {"type": "url", "url": "a.jpg"}}, ("a.jpg",)),
        (f"data:image/png;base64,{TEXT}", (PNG,)),
        (f"data:;base64,{TEXT}", (PNG,)),
        (TEXT, (PNG,)),
        ("https://a.org/b.jpg", ("https://a.org/b.jpg",)),  # refused where it would be opened
        ("/9j/not/long", ("/9j/not/long",)),
        ("Qk" + "a" * 100 + ".jpg", ("Qk" + "a" * 100 + ".jpg",)),
    ],
)
def test_every_spelling_is_a_path_or_the_bytes_of_a_file(value, expected):
    assert read_images(value, "image", "record 'r'") == expected


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_text_is_known_by_how_a_file_begins(name):
    data, text = in_format(name)
    assert read_images(text, "image", "record 'r'") == (data,)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "'image' holds str ''"),
        ([""], "'image' holds str ''"),
        ([None], "'image' holds NoneType None"),
        (["a.jpg", None], "'image' holds NoneType None"),
        (b"", "'image' holds 0 bytes"),
        (7, "'image' holds int 7"),
        (True, "'image' holds bool True"),
        ([["a.jpg"]], "'image' holds list"),
        ({}, "an object with nothing and no image in it"),
        ([{"bytes": None, "path": None}], "no image in it; expected bytes or a path"),
        ({"height": 3}, "an object with 'height' and no image"),
        ({"bytes": "#" * 50}, "not base64"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png;base64,", "base64 text without content"),
        ("data:image/png,abc", r"expected data:image/...;base64,..."),
        ("data:video/mp4;base64,AAAA", r"expected data:image/...;base64,..."),
        ({"source": {"type": "base64"}}, "the source dict"),
    ],
)
def test_what_is_no_image_is_refused_with_key_and_record(value, words):
    with pytest.raises(DataError, match=words) as error:
        read_images(value, "image", "record 'r'")
    assert "record 'r'" in str(error.value)
