"""What a visitor sends becomes a turn that the model reads, or a sentence about what is wrong."""

import pytest
from conftest import draw_image

from llava_lite.media.image import ImageError
from llava_lite.serve.demo_conversation import Ask, Conversation, Session, Upload, as_markdown, read_ask


@pytest.fixture
def files(tmp_path):
    """Paths of two images, a sound and a video, of which only the images are real."""
    for i in range(2):
        draw_image(i).save(tmp_path / f"{i}.png")
    for name in ("tone.wav", "clip.mp4"):
        (tmp_path / name).write_bytes(b"not read")
    return {name: str(tmp_path / name) for name in ("0.png", "1.png", "tone.wav", "clip.mp4")}


def answered(conversation, ask, kinds=("image",), answer="yes"):
    """Add an answered turn to a conversation and return what was to be given to the model."""
    turn, images, media = conversation.begin(ask, kinds, "toy")
    turn.answer = answer
    conversation.turns.append(turn)
    return turn.question, [path.name for path in images], media


def test_every_image_has_its_placeholder_in_the_turn_that_brought_it(files):
    talk = Conversation()
    first = answered(talk, read_ask(" What? ", [files["0.png"]]))
    second = answered(talk, read_ask("And this?", [files["1.png"]]))
    third = answered(talk, read_ask("Which?", []))
    assert first == ("<image>\nWhat?", ["0.png"], None)
    assert second == ("<image>\nAnd this?", ["0.png", "1.png"], None)
    assert third == ("Which?", ["0.png", "1.png"], None)
    assert talk.history == [("<image>\nWhat?", "yes"), ("<image>\nAnd this?", "yes"), ("Which?", "yes")]


def test_a_sound_and_an_image_are_one_input_wherever_they_were_sent(files):
    talk, kinds = Conversation(), ("image", "audio")
    assert answered(talk, read_ask("Hello!", []), kinds) == ("Hello!", [], None)
    heard = answered(talk, read_ask("What is it?", [files["tone.wav"]]), kinds)
    assert heard == ("<image>\nWhat is it?", [], {"audio": files["tone.wav"]})
    seen = answered(talk, read_ask("And now?", [files["0.png"]]), kinds)
    assert seen == ("And now?", [], {"audio": files["tone.wav"], "image": files["0.png"]})
    with pytest.raises(ValueError, match=r"^1\.png is a second file of kind image; toy mixes one file of each kind"):
        talk.begin(read_ask("And this?", [files["1.png"]]), kinds, "toy")
    assert len(talk.turns) == 3


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("clip.mp4", ("image",), r"^clip\.mp4 is of kind video, and toy reads image and text\.$"),
        ("clip.mp4", ("image", "audio"), r"^clip\.mp4 is of kind video, and toy reads image, audio and text\.$"),
        ("0.png", (), r"^0\.png is of kind image, and toy reads text alone\.$"),
    ],
)
def test_a_file_that_the_model_does_not_read_is_named(files, name, kinds, message):
    talk = Conversation()
    with pytest.raises(ValueError, match=message):
        talk.begin(read_ask("What?", [files[name]]), kinds, "toy")
    assert talk.turns == []


@pytest.mark.parametrize(
    ("name", "data"), [("broken.png", b"\x89PNG\r\n\x1a\nnothing"), ("notes.txt", b"hello"), ("empty.jpg", b"")]
)
def test_what_is_no_image_is_named_without_the_directory_of_the_server(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=f"^cannot use the image '{name}': ") as caught:
        read_ask("What?", [str(tmp_path / name)])
    assert str(tmp_path) not in str(caught.value)


def test_an_image_alone_is_a_question_and_nothing_is_none(files):
    assert answered(Conversation(), read_ask("", [files["0.png"]]))[0] == "<image>\n"
    for text, paths in (("  ", []), (None, None)):
        with pytest.raises(ValueError, match="the question is empty"):
            read_ask(text, paths)


def test_placeholders_that_a_visitor_types_are_images_or_an_error(files):
    written = read_ask("Is <image> like <image>?", [files["0.png"], files["1.png"]])
    assert answered(Conversation(), written)[0] == "Is <image> like <image>?"
    with pytest.raises(ValueError, match="1 <image> placeholders in the conversation but 0 images"):
        Conversation().begin(read_ask("What is <image>?", []), ("image",), "toy")


def test_messages_show_files_text_and_answer(files):
    talk = Conversation()
    answered(talk, read_ask("What?", [files["0.png"]]))
    talk.turns.append(talk.begin(read_ask("And?", []), ("image",), "toy")[0])
    assert talk.messages() == [
        {"role": "user", "content": {"path": files["0.png"]}},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And?"},
    ]


def test_tags_are_shown_as_they_are_written_and_code_stays_code():
    assert as_markdown("a <b> & **c**") == "a &lt;b&gt; &amp; **c**"
    assert as_markdown("`<b>` <c>\n```\n<d>\n``` <e>\n```\n<f") == "`<b>` &lt;c&gt;\n```\n<d>\n``` &lt;e&gt;\n```\n<f"


def test_errors_name_files_as_the_visitor_does():
    ask = Ask("What?", (Upload("/srv/uploads/ab12/tone.wav", "audio"),))
    assert ask.sentence(ValueError("cannot use '/srv/uploads/ab12/tone.wav': x.")) == "cannot use 'tone.wav': x."


def test_a_question_is_taken_back_from_the_panels_that_have_it():
    session = Session([Conversation(), Conversation()])
    assert session.take_back() is None
    earlier, session.last = Ask("One?"), Ask("Two?")
    for panel in session.panels:
        answered(panel, earlier)
    answered(session.panels[0], session.last)
    assert session.take_back().text == "Two?"
    assert [[turn.ask.text for turn in panel.turns] for panel in session.panels] == [["One?"], ["One?"]]
    session.clear()
    assert (session.last, [panel.turns for panel in session.panels]) == (None, [[], []])
