"""Turn a line typed in the chat that begins with / into what it does to the conversation."""

import os
import shlex
from dataclasses import dataclass, field

from llava_lite.image_inputs import ADDRESSES, upright_picture

HELP = """\
/image FILE   show an image with the next question; also an address (https://...)
/clear        forget the conversation and its images
/help         this list
/exit         end the chat, as an empty line or Ctrl-D does
Ctrl-C stops an answer. A question that begins with / needs a blank before it."""
EXIT = ("/exit", "/quit", "/q")


@dataclass
class Talk:
    """What was said so far, as (question, answer) pairs, and the images that belong to it, in order."""

    images: list = field(default_factory=list)
    history: list = field(default_factory=list)


def is_command(line: str) -> bool:
    """Tell whether a line is a command: it begins with / and not with a blank."""
    return line.startswith("/")


def obey(line: str, talk: Talk, say, has_tower: bool) -> bool:
    """Do what a command says and answer with a sentence; return whether the chat goes on.

    say: takes the text to show. has_tower: whether the model sees images.
    """
    name, _, rest = line.strip().partition(" ")
    if name in EXIT:
        return False
    if name == "/help":
        say(f"{HELP}\n")
    elif name == "/clear":
        talk.history.clear()
        talk.images.clear()
        say("The conversation begins again, without images.\n")
    elif name == "/image":
        say(f"{show(rest.strip(), talk, has_tower)}\n")
    else:
        say(f"There is no command {name}; /help lists them. To say it to the model, put a blank before it.\n")
    return True


def show(rest: str, talk: Talk, has_tower: bool) -> str:
    """Add the images that a command names to the conversation; return the sentence that answers it."""
    if not has_tower:
        return "This model has no vision tower: it reads text alone."
    if not rest:
        return "Name a file: /image FILE."
    try:
        images = [upright_picture(path) for path in paths_in(rest)]
    except (OSError, ValueError) as error:
        return str(error)
    talk.images += images
    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
    return f"{'An image' if len(images) == 1 else f'{len(images)} images'} ({sizes}) for the next question."


def paths_in(rest: str) -> list[str]:
    """Return the paths that stand behind a command: one with blanks as it is, else as a shell would read them."""
    whole = os.path.expanduser(rest)
    if os.path.exists(whole) or rest.startswith(ADDRESSES):
        return [whole]
    try:
        words = shlex.split(rest)
    except ValueError:
        return [whole]
    words = [os.path.expanduser(word) for word in words]
    # One path that is not there is told as it was typed, not in pieces.
    return words if any(os.path.exists(word) for word in words) else [whole]
