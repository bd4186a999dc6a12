"""Commands of the chat: what each does and answers, and the message for those that do not exist."""

import pytest
from PIL import Image

from llava_lite.serve.typed import EXIT, HELP, Conversation, is_command, obey, paths_in


@pytest.fixture
def directory(tmp_path, monkeypatch):
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(line, conversation=None, has_tower=True):
    """Return (whether the chat continues, what was shown)."""
    output = []
    continues = obey(line, Conversation() if conversation is None else conversation, output.append, has_tower)
    return continues, "".join(output)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/image a.png", "An image (6 x 4) for the next question."),
        ("/image b c.png", "An image (6 x 4) for the next question."),
        ("/image 'b c.png'", "An image (6 x 4) for the next question."),
        ("/image b\\ c.png", "An image (6 x 4) for the next question."),
        ("/image   a.png  ", "An image (6 x 4) for the next question."),
        ("/image a.png 'b c.png'", "2 images (6 x 4, 6 x 4) for the next question."),
        ("/image", "Name a file: /image FILE."),
        ("/image gone.png", "cannot use the image 'gone.png': there is no such file."),
        ("/image it's gone.png", "there is no such file."),
        ("/image notes.txt", "cannot use the image 'notes.txt'"),
        ("/clear", "The conversation starts again, without images."),
        ("/help", HELP),
        ("/foo", "There is no command /foo; /help lists them. To send it to the model, put a space before it."),
        ("/home/me/a.png", "There is no command /home/me/a.png; /help lists them."),
        ("/", "There is no command /; /help lists them."),
    ],
)
def test_a_command_is_answered(line, shown, directory):
    assert is_command(line)
    continues, output = answer(line)
    assert continues
    assert shown in output


@pytest.mark.parametrize("word", EXIT)
def test_exit_ends_the_chat(word):
    assert answer(f"{word} ") == (False, "")


def test_images_are_kept_in_order_and_those_that_fail_are_not(directory):
    conversation = Conversation()
    answer("/image a.png", conversation)
    answer("/image gone.png", conversation)
    answer("/image a.png notes.txt", conversation)
    assert len(conversation.images) == 1
    conversation.history.append(("q", "a"))
    answer("/clear", conversation)
    assert conversation == Conversation()


def test_a_model_without_a_tower_says_so(directory):
    conversation = Conversation()
    assert answer("/image a.png", conversation, has_tower=False) == (
        True,
        "This model has no vision tower: it reads text alone.\n",
    )
    assert conversation.images == []


def test_home_and_addresses_are_paths(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory))
    assert paths_in("~/a.png") == [f"{directory}/a.png"]
    assert paths_in("https://x.org/a b.png") == ["https://x.org/a b.png"]
