"""A conversation in any spelling is the same turns; what is not understood is refused, never passed over."""

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.records.record import parse_record

TWO = (("human", "q"), ("gpt", "a"))


def turns_of(conversation, key="conversations", **more):
    return parse_record({"id": "r", key: conversation, **more}, "here")


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
@pytest.mark.parametrize("asked", ["human", "user", "User", " HUMAN "])
@pytest.mark.parametrize("answered", ["gpt", "assistant", "model", "chatgpt", "bot", "GPT"])
@pytest.mark.parametrize("names", [("from", "value"), ("role", "content"), ("role", "value"), ("from", "content")])
def test_all_spellings_of_speakers_and_keys_are_read(key, asked, answered, names):
    role, text = names
    assert turns_of([{role: asked, text: "q"}, {role: answered, text: "a"}], key).turns == TWO


@pytest.mark.parametrize("pair", [("human", "assistant"), ("user", "assistant")])
def test_pairs_of_question_and_answer_are_read(pair):
    conversation = [dict(zip(pair, ("q", "a"), strict=True)), dict(zip(pair, ("r", "b"), strict=True))]
    assert turns_of(conversation, "conversation").turns == (*TWO, ("human", "r"), ("gpt", "b"))


def test_an_object_of_lists_is_a_list_of_objects():
    assert turns_of({"role": ["user", "assistant"], "content": ["q", "a"]}, "messages").turns == TWO


@pytest.mark.parametrize("role", ["system", "developer", "System"])
@pytest.mark.parametrize("text", ["Be brief.", "", [{"type": "text", "text": "Be brief."}]])
def test_a_system_turn_is_the_system_text(role, text):
    record = turns_of([{"role": role, "content": text}, user("q"), assistant("a")], "messages")
    assert record.turns == TWO
    assert record.system == ("" if text == "" else "Be brief.")


@pytest.mark.parametrize(
    ("top", "turn", "expected"),
    [
        (None, None, None),
        ("", None, None),
        ("S", None, "S"),
        (None, "S", "S"),
        ("S", "S", "S"),
        ("", "S", "S"),
        (None, "", ""),
    ],
)
def test_a_system_text_may_be_a_key_or_a_turn(top, turn, expected):
    spoken = [] if turn is None else [{"from": "system", "value": turn}]
    conversation = [*spoken, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert turns_of(conversation, system=top).system == expected


PARTS = [
    # (content of the question, text, images)
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", ()),
    (["a", {"type": "text", "text": " b"}], "a b", ()),
    ([{"type": "image", "image": "1.png"}, {"type": "text", "text": "q"}], "<image>q", ("1.png",)),
    ([{"type": "text", "text": "q "}, {"type": "image", "path": "1.png"}], "q <image>", ("1.png",)),
    (
        [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "1.png"}}, "b"],
        "a<image>b",
        ("1.png",),
    ),
    ([{"type": "image_url", "image_url": "1.png"}, "q"], "<image>q", ("1.png",)),
    ([{"type": "input_image", "image_url": "1.png"}, {"type": "input_text", "text": "q"}], "<image>q", ("1.png",)),
    ([{"type": "image", "source": {"type": "url", "url": "1.png"}}, "q"], "<image>q", ("1.png",)),
    ([{"image": "1.png"}, {"text": "q"}], "<image>q", ("1.png",)),
    ([{"type": "image", "image": "1.png", "text": None}, {"type": "text", "text": "q"}], "<image>q", ("1.png",)),
    (
        [{"type": "image", "url": "1.png"}, "and", {"type": "image", "url": "2.png"}],
        "<image>and<image>",
        ("1.png", "2.png"),
    ),
]


@pytest.mark.parametrize(("content", "text", "images"), PARTS)
def test_parts_stand_where_they_stood_and_nothing_is_put_between(content, text, images):
    record = turns_of([user(content), assistant([{"type": "text", "text": "a"}])], "messages")
    assert record.turns == (("human", text), ("gpt", "a"))
    assert record.images == images


def test_parts_without_an_image_take_those_of_the_record_in_order():
    parts = [{"type": "image"}, "x", {"type": "image", "text": None, "image_url": None}]
    record = turns_of([user(parts), assistant("a"), user([{"type": "image"}]), assistant("b")], "messages",
                      images=["1.png", "2.png", "3.png"])  # fmt: skip
    assert record.images == ("1.png", "2.png", "3.png")
    assert [text for _, text in record.turns[::2]] == ["<image>x<image>", "<image>"]


@pytest.mark.parametrize(
    "switch",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss_scale": 0}, {"masked": True}],
)
def test_an_answer_may_be_excluded_from_the_loss(switch):
    conversation = [user("q"), assistant("a", **switch), user("r"), assistant("b")]
    assert turns_of(conversation, "messages").not_supervised == {1}
    # A greeting is left out and the positions move with it.
    spoken = [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **switch}]
    assert turns_of(spoken).not_supervised == {1}


@pytest.mark.parametrize("switch", [{"weight": 1}, {"weight": 1.0}, {"loss": True}, {"loss": None}, {"masked": False}])
def test_a_switch_that_is_on_changes_nothing(switch):
    assert turns_of([user("q"), assistant("a", **switch)], "messages").not_supervised == frozenset()


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], "'messages' is empty"),
        ("q", "'messages' is str 'q'"),
        ([user("q"), {"role": "tool", "content": "3"}], "from 'tool'; tools and functions are not supported"),
        ([user("q"), {"role": "function_call", "content": "3"}], "tools and functions are not supported"),
        ([user("q"), assistant(None, tool_calls=[{"id": "1"}])], "a turn has 'tool_calls'; tools"),
        ([user("q"), assistant("a", function_call={"name": "f"})], "a turn has 'function_call'"),
        ([user("q"), assistant("a", reasoning_content="because")], "a turn has 'reasoning_content'"),
        ([user("q"), assistant("a", weight=0.5)], "weight 0.5; an answer is supervised"),
        ([user("q"), assistant("a", weight="0")], "weight '0'"),
        ([user("q"), assistant("a", weight=1, loss=False)], "weight, loss of a turn contradict each other"),
        ([user("q", loss=True), assistant("a")], "only answers are supervised"),
        ([user("q", images=["1.png"]), assistant("a")], "a turn has the key 'images'"),
        ([user("q", img="1.png"), assistant("a")], "a turn has the key 'img'"),
        ([user("q", audio={"path": "a.wav"}), assistant("a")], "a turn has the key 'audio'"),
        ([user(None), assistant("a")], "the 'value' of a turn is NoneType"),
        ([user("q"), assistant(None)], "the 'value' of a turn is NoneType"),
        ([user({"text": "q"}), assistant("a")], "the 'value' of a turn is dict"),
        ([user([7]), assistant("a")], "a part of a turn is int 7"),
        ([user([{"type": "video", "video": "a.mp4"}]), assistant("a")], "a part is of type 'video'"),
        ([user([{"type": "input_audio", "input_audio": {}}]), assistant("a")], "a part is of type 'input_audio'"),
        ([user([{"type": "text"}]), assistant("a")], "a part of type 'text' has no 'text'"),
        ([user([{"type": "text", "text": "q", "image": "1.png"}]), assistant("a")], "holds image beside its text"),
        ([user([{"type": "image", "image": "1.png", "text": "q"}]), assistant("a")], "holds text as well"),
        ([user([{"type": "image", "image": "1.png", "url": "2.png"}]), assistant("a")], "names its image 2 times"),
        ([user([{"type": "image", "file_id": "f"}]), assistant("a")], "an image part has file_id"),
        ([user([{"type": "image", "image": ["1.png"]}]), assistant("a")], "'image' holds list"),
        ([user([{}]), assistant("a")], "a part has nothing, expected 'type'"),
        (
            [user(["<image>", {"type": "image", "image": "1.png"}]), assistant("a")],
            "image parts and also <image> in a text",
        ),
        ([user("q"), assistant([{"type": "image", "image": "1.png"}])], "an answer holds an image part"),
        ([{"role": "system", "content": [{"type": "image"}]}, user("q"), assistant("a")], "the system turn holds an"),
        ([user("q"), {"role": "system", "content": "s"}, assistant("a")], "a system turn comes after others"),
        ([{"role": "system", "content": "s"}] * 2 + [user("q"), assistant("a")], "a system turn comes after others"),
        ([user("q"), user("r"), assistant("a")], "turn 2 of . is from 'human', expected 'gpt'"),
        ([assistant("Hi"), user("q"), assistant("a")], "'messages' begin with an answer"),
        ([{"role": "user", "content": "q", "value": "r"}, assistant("a")], "'value' and 'content', and they differ"),
        ([{"role": "narrator", "content": "q"}], "from 'narrator', expected 'human' or 'gpt'"),
        ([{"content": "q"}], "a turn is from None"),
        ([{"role": "system", "content": "s"}], "no question and no answer; no turn remains"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_record(conversation, words):
    with pytest.raises(DataError, match=words) as error:
        turns_of(conversation, "messages")
    assert "record 'r' (here)" in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"system": "S"}, "a system text under 'system' and another in its system turn"),
        ({"system": ["S"]}, "'system' is list"),
    ],
)
def test_two_system_texts_are_refused(more, words):
    with pytest.raises(DataError, match=words):
        turns_of([{"role": "system", "content": "T"}, user("q"), assistant("a")], "messages", **more)


@pytest.mark.parametrize(
    ("parts", "images", "words"),
    [
        ([{"type": "image", "image": "1.png"}], ["2.png"], "image parts name their images, and 'image' or 'images'"),
        ([{"type": "image", "image": "1.png"}, {"type": "image"}], ["2.png"], "some image parts name their image"),
        ([{"type": "image"}], ["1.png", "2.png"], "1 <image> placeholders in the conversation but 2 images"),
        ([{"type": "image"}] * 2, ["1.png"], "2 <image> placeholders in the conversation but 1 images"),
    ],
)
def test_images_of_parts_and_of_the_record_must_agree(parts, images, words):
    with pytest.raises(DataError, match=words):
        turns_of([user(parts), assistant("a")], "messages", images=images)
    # The same images named twice are consistent.
    same = [user([{"type": "image", "image": "1.png"}]), assistant("a")]
    assert turns_of(same, "messages", images=["1.png"]).images == ("1.png",)
