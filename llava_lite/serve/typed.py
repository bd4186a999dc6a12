"""Turn a line typed in the chat that begins with / into what it does to the conversation."""

import os
import shlex
from dataclasses import dataclass, field

from llava_lite.media.image import URL_STARTS, upright_image

HELP = """\
/image FILE   show an image with the next question; also an address (https://...)
/clear        forget the conversation and its images
/help         this list
/exit         end the chat, as an empty line or Ctrl-D does
Ctrl-C stops an answer. A question that begins with / needs a space before it."""
EXIT = ("/exit", "/quit", "/q")


@dataclass
class Conversation:
    """The turns so far, as (question, answer) pairs, and their images, in order."""

    images: list = field(default_factory=list)
    history: list = field(default_factory=list)


def is_command(line: str) -> bool:
    """Return whether a line is a command: it begins with /, without a space before it."""
    return line.startswith("/")


def obey(line: str, conversation: Conversation, say, has_tower: bool) -> bool:
    """Run a command and show its answer; return whether the chat goes on.

    say: takes the text to show. has_tower: whether the model sees images.
    """
    name, _, rest = line.strip().partition(" ")
    if name in EXIT:
        return False
    if name == "/help":
        say(f"{HELP}\n")
    elif name == "/clear":
        conversation.history.clear()
        conversation.images.clear()
        say("The conversation starts again, without images.\n")
    elif name == "/image":
        say(f"{show(rest.strip(), conversation, has_tower)}\n")
    else:
        say(f"There is no command {name}; /help lists them. To send it to the model, put a space before it.\n")
    return True


def show(rest: str, conversation: Conversation, has_tower: bool) -> str:
    """Add the images that a command names to the conversation; return the sentence that answers it."""
    if not has_tower:
        return "This model has no vision tower: it reads text alone."
    if not rest:
        return "Name a file: /image FILE."
    try:
        images = [upright_image(path) for path in paths_in(rest)]
    except (OSError, ValueError) as error:
        return str(error)
    conversation.images += images
    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
    return f"{'An image' if len(images) == 1 else f'{len(images)} images'} ({sizes}) for the next question."


def paths_in(rest: str) -> list[str]:
    """Return the paths after a command: one with spaces as it is, else split as a shell does."""
    path = os.path.expanduser(rest)
    if os.path.exists(path) or rest.startswith(URL_STARTS):
        return [path]
    try:
        paths = shlex.split(rest)
    except ValueError:
        return [path]
    paths = [os.path.expanduser(one) for one in paths]
    # A path that does not exist is reported as it was typed, not in pieces.
    return paths if any(os.path.exists(one) for one in paths) else [path]
