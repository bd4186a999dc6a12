"""Commands of the chat: what each does and answers, and what is said about those that are none."""

import pytest
from PIL import Image

from llava_lite.serve.typed import EXIT, HELP, Talk, is_command, obey, paths_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(line, talk=None, has_tower=True):
    """Return (whether the chat goes on, what was shown)."""
    said = []
    goes_on = obey(line, Talk() if talk is None else talk, said.append, has_tower)
    return goes_on, "".join(said)


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
        ("/image gone.png", "cannot use the picture 'gone.png': there is no such file."),
        ("/image it's gone.png", "there is no such file."),
        ("/image notes.txt", "cannot use the picture 'notes.txt'"),
        ("/clear", "The conversation begins again, without images."),
        ("/help", HELP),
        ("/foo", "There is no command /foo; /help lists them. To say it to the model, put a blank before it."),
        ("/home/me/a.png", "There is no command /home/me/a.png; /help lists them."),
        ("/", "There is no command /; /help lists them."),
    ],
)
def test_a_command_is_answered(line, shown, folder):
    assert is_command(line)
    goes_on, said = answer(line)
    assert goes_on
    assert shown in said


@pytest.mark.parametrize("word", EXIT)
def test_exit_ends_the_chat(word):
    assert answer(f"{word} ") == (False, "")


def test_images_are_kept_in_order_and_those_that_fail_are_not(folder):
    talk = Talk()
    answer("/image a.png", talk)
    answer("/image gone.png", talk)
    answer("/image a.png notes.txt", talk)
    assert len(talk.images) == 1
    talk.history.append(("q", "a"))
    answer("/clear", talk)
    assert talk == Talk()


def test_a_model_without_a_tower_says_so(folder):
    talk = Talk()
    assert answer("/image a.png", talk, has_tower=False) == (
        True,
        "This model has no vision tower: it reads text alone.\n",
    )
    assert talk.images == []


def test_home_and_addresses_are_paths(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert paths_in("~/a.png") == [f"{folder}/a.png"]
    assert paths_in("https://x.org/a b.png") == ["https://x.org/a b.png"]
