"""Words and pictures of messages, dealt to prompts."""

import pytest
from PIL import Image

from llava_lite.messages import as_list, pictures_of_each, read_messages

RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def colours(groups):
    return [[picture.getpixel((0, 0)) for picture in group] for group in groups]


@pytest.mark.parametrize("images", [[RED, BLUE, RED], [[RED], None, [BLUE, RED]], [RED, [], (BLUE, RED)]])
def test_flat_and_grouped_pictures_are_dealt_alike(images):
    texts = ["<image> what?", "Hello!", "<image> and <image>"]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colours(pictures_of_each(images, texts)) == [[red], [], [blue, red]]


def test_transparent_and_grey_pictures_become_rgb():
    modes = [RED.convert(mode) for mode in ("RGBA", "L", "P", "1", "CMYK")]
    (group,) = pictures_of_each(modes, ["<image>" * 5])
    assert [picture.mode for picture in group] == ["RGB"] * 5


def test_a_single_picture_is_a_list_of_one():
    assert (as_list(None), as_list(RED), as_list((RED, BLUE))) == ([], [RED], [RED, BLUE])


def test_messages_are_read_in_order():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "In"}, {"type": "image", "image": RED}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "and here?"}]},
    ]
    turns, system, pictures = read_messages(messages)
    assert turns == [("In\n<image>", "red"), ("<image>\nand here?", None)]
    assert (system, pictures) == ("Be brief.", [RED, "a.png"])
