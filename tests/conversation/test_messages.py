"""Words and images of messages, dealt to prompts."""

import copy

import pytest
from PIL import Image
from transformers import BatchFeature

from llava_lite.conversation.images import as_list, group_images
from llava_lite.conversation.messages import read_conversations, with_images
from llava_lite.conversation.prompts import regular_turns

RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def colours(groups):
    return [[image.getpixel((0, 0)) for image in group] for group in groups]


@pytest.mark.parametrize("images", [[RED, BLUE, RED], [[RED], None, [BLUE, RED]], [RED, [], (BLUE, RED)]])
def test_flat_and_grouped_images_are_dealt_alike(images):
    texts = ["<image> what?", "Hello!", "<image> and <image>"]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colours(group_images(images, texts)) == [[red], [], [blue, red]]


def test_transparent_and_grey_images_become_rgb():
    modes = [RED.convert(mode) for mode in ("RGBA", "L", "P", "1", "CMYK")]
    (group,) = group_images(modes, ["<image>" * 5])
    assert [image.mode for image in group] == ["RGB"] * 5


def test_a_single_image_is_a_list_of_one():
    assert (as_list(None), as_list(RED), as_list((RED, BLUE))) == ([], [RED], [RED, BLUE])


def test_messages_are_read_in_order():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "In"}, {"type": "image", "image": RED}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "and here?"}]},
    ]
    (conversation,), many = read_conversations(messages)
    assert not many
    assert regular_turns(conversation) == ([("In\n<image>", "red"), ("<image>\nand here?", None)], "Be brief.")
    assert with_images([conversation], None) == [[RED, "a.png"]]


RED_PART, HI = {"type": "image", "image": RED}, {"type": "text", "text": "Hi"}


def user(content):
    return [{"role": "user", "content": content}]


SPELLINGS = {
    "text": ("Hi", "Hi", []),
    "no text": ("", "", []),
    "part": ([HI], "Hi", []),
    "tuple of parts": ((HI, RED_PART), "Hi\n<image>", [RED]),
    "bare text among parts": (["Hi", RED_PART], "Hi\n<image>", [RED]),
    "no type, a text": ([{"text": "Hi"}], "Hi", []),
    "no type, an image": ([{"image": RED}], "<image>", [RED]),
    "no type, OpenAI's": ([{"image_url": {"url": "a.png"}}], "<image>", ["a.png"]),
    "OpenAI's image": ([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}], "<image>", ["a.png"]),
    "OpenAI's image, an address": ([{"type": "image_url", "image_url": "a.png"}], "<image>", ["a.png"]),
    "OpenAI's responses": (
        [{"type": "input_text", "text": "Hi"}, {"type": "input_image", "image_url": "a.png"}],
        "Hi\n<image>",
        ["a.png"],
    ),
    "nulls beside": ([{"type": "image", "image": None, "path": "a.png", "url": None}], "<image>", ["a.png"]),
    "more keys": ([{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}], "Hi", []),
    "an empty text": ([{"type": "text", "text": ""}, RED_PART], "\n<image>", [RED]),
    "base64": ([{"type": "image", "base64": "AAAA"}], "<image>", [b"\0\0\0"]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_contents_are_read_in_their_spellings(spelling):
    content, text, images = SPELLINGS[spelling]
    (conversation,), _ = read_conversations(user(content))
    assert (conversation[0].text, conversation[0].images) == (text, images)


class Answered:
    """A message as a client's library holds it, or a conversation as transformers' pipeline does."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("conversation", "many"),
    [
        (user("Hi"), False),
        (tuple(user("Hi")), False),
        ([user("Hi")], True),
        ((tuple(user("Hi")),), True),
        (Answered(messages=user("Hi")), False),
        ([Answered(messages=user("Hi"))], True),
        ([Answered(role="user", content="Hi", tool_calls=None)], False),
        ([{"role": "user", "content": "Hi", "name": "Ann", "id": 3}], False),
    ],
)
def test_conversations_come_alone_and_in_lists(conversation, many):
    (messages,), is_many = read_conversations(conversation)
    assert (messages[0].role, messages[0].text, is_many) == ("user", "Hi", many)


REFUSED = [
    (None, "a conversation is a list of messages.*got None"),
    ("Hi", "got a str"),
    ({"role": "user", "content": "Hi"}, "got a dict with 'role', 'content'"),
    ({"messages": []}, "Give its 'messages'"),
    (BatchFeature({"input_ids": [[1]]}), "got a BatchFeature with 'input_ids'"),
    ([], "the conversation is empty"),
    ([[]], "conversation 1 is empty"),
    ([user("Hi"), []], "conversation 2 is empty"),
    ([user("Hi"), {"role": "user", "content": "Hi"}], "some entries of the conversation are messages"),
    (["Hi"], "message 1 is a str"),
    ([None], "message 1 is None"),
    ([[None]], "conversation 1, message 1 is None"),
    ([{}], "message 1 has no 'role', only nothing"),
    ([{"content": "Hi"}], "message 1 has no 'role', only 'content'"),
    ([{"from": "human", "value": "Hi"}], "'from' and 'value' are ShareGPT's"),
    ([{"role": "human", "content": "Hi"}], "message 1 has the role 'human'; known: .*Did you mean 'user'"),
    ([{"role": None, "content": "Hi"}], "the role None"),
    ([{"role": ["user"], "content": "Hi"}], r"the role \['user'\]"),
    ([{"role": "user"}], r"message 1 \(user\) has no 'content'"),
    (user(None), r"message 1 \(user\) has 'content' None"),
    (user(3), r"the content of message 1 \(user\) is a int"),
    (user(HI), "is a dict; put the part into a list"),
    (user([]), r"the content of message 1 \(user\) is an empty list"),
    (user([[HI]]), r"part 1 of message 1 \(user\) is a list"),
    (user([None]), r"part 1 of message 1 \(user\) is None"),
    (user([RED]), "part 1 of message 1 .user. is a Image"),
    (user([HI, {}]), r"part 2 of message 1 \(user\) has no 'type', only nothing"),
    (user([{"path": "a.png"}]), "has no 'type', only 'path'"),
    (user([{"text": "Hi", "image": RED}]), "has no 'type', only 'text', 'image'"),
    (user([{"type": "text"}]), "is a text and has no 'text'"),
    (user([{"type": "text", "text": None}]), "is a text and has 'text' None"),
    (user([{"type": "text", "text": 3}]), "is a text and has 'text' 3"),
    (user([{"type": "text", "content": "Hi"}]), "is a text and has no 'text'"),
    (user([{"type": "video", "path": "a.mp4"}]), "has the type 'video'; known: text, image, image_url"),
    (user([{"type": None, "text": "Hi"}]), "has the type None"),
    (user([{"type": ["text"], "text": "Hi"}]), r"has the type \['text'\]"),
    (user([{"type": "image_url", "image_url": {"detail": "low"}}]), "an 'image_url' without a 'url'"),
    (user([{"type": "image", "path": "a.png", "url": "b.png"}]), "has 2 images: path, url"),
    (user([{"type": "image", "base64": "?"}]), "not base64"),
    (user([{"type": "image", "base64": 3}]), "base64 is a text; got int"),
]


@pytest.mark.parametrize(("conversation", "output"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_no_conversation_is_reported_with_its_place(conversation, output):
    with pytest.raises((ValueError, TypeError), match=output):
        read_conversations(conversation)


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image", "image": None}, {"type": "image_url"}])
def test_an_image_part_without_an_image_is_refused_where_one_is_needed(part):
    conversations, _ = read_conversations(user([part, HI]))
    assert conversations[0][0].text == "<image>\nHi"
    with pytest.raises(
        ValueError, match="1 image parts of conversation 1 have no image; give one of image, path, url"
    ):
        with_images(conversations, None)
    assert with_images(conversations, RED) == with_images(conversations, [[RED]]) == [[RED]]


def test_messages_are_not_changed():
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, dict(HI)]}
    before = copy.deepcopy(message)
    read_conversations([message])
    assert message == before
