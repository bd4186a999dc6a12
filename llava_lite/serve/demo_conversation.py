"""Turn what a visitor of the page uploads and types into the turns of a conversation, one for each model shown."""

from __future__ import annotations

import mimetypes
import os
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from llava_lite.conversation.images import add_placeholders
from llava_lite.errors import get_sentence
from llava_lite.media.image import ImageError, open_image


@dataclass(frozen=True, eq=False)
class Upload:
    """A file of a question. kind: "image", "audio" or "video", by its name."""

    path: str
    kind: str

    @property
    def name(self) -> str:
        """Return the name without the directory that the server keeps it in."""
        return os.path.basename(self.path)


@dataclass(frozen=True, eq=False)
class Ask:
    """A question as it was sent: to one model, or to two at once."""

    text: str
    uploads: tuple[Upload, ...] = ()

    def sentence(self, error: BaseException) -> str:
        """Return the message of an error about it, with the names of files in place of the server's paths."""
        message = get_sentence(error)
        for upload in self.uploads:
            message = message.replace(upload.path, upload.name)
        return message


@dataclass(eq=False)
class Turn:
    """A question, its text as the model reads it (with image placeholders), and the answer so far.

    remark: what is to be said of the answer, if anything.
    """

    ask: Ask
    question: str
    answer: str = ""
    remark: str = ""


@dataclass(eq=False)
class Conversation:
    """What one visitor asked one model."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def history(self) -> list[tuple[str, str]]:
        """Return the (question, answer) pairs so far."""
        return [(turn.question, turn.answer) for turn in self.turns]

    def uploads(self, ask: Ask) -> list[Upload]:
        """Return the files of the conversation and of a next question, in order."""
        return [upload for one in (*(turn.ask for turn in self.turns), ask) for upload in one.uploads]

    def begin(self, ask: Ask, kinds, name: str) -> tuple[Turn, list[Path], dict | None]:
        """Return (turn without answer, images, media) of a next question; the conversation stays as it is.

        kinds: what the model called `name` reads. media: kind -> path, where there are sounds or videos, which are
        mixed with the image into one input; else None. Raises ValueError for what the model cannot read.
        """
        uploads = self.uploads(ask)
        for upload in uploads:
            if upload.kind not in kinds:
                raise ValueError(f"{upload.name} is of kind {upload.kind}, and {name} reads {_listed(kinds)}.")
        images = [Path(upload.path) for upload in uploads]
        if all(upload.kind == "image" for upload in uploads):
            return Turn(ask, add_placeholders(ask.text, self.history, len(images))), images, None
        media = {}
        for upload in uploads:
            if upload.kind in media:
                raise ValueError(
                    f"{upload.name} is a second file of kind {upload.kind}; {name} mixes one file of each kind into "
                    "what it hears and sees, so start a new conversation about it."
                )
            media[upload.kind] = upload.path
        return Turn(ask, add_placeholders(ask.text, self.history, 1)), [], media

    def messages(self) -> list[dict]:
        """Return the conversation as the messages of gradio's Chatbot."""
        shown = []
        for turn in self.turns:
            shown += [{"role": "user", "content": {"path": upload.path}} for upload in turn.ask.uploads]
            shown += [{"role": "user", "content": as_markdown(turn.ask.text)}] if turn.ask.text else []
            shown += [{"role": "assistant", "content": as_markdown(turn.answer)}] if turn.answer else []
        return shown


@dataclass(eq=False)
class Session:
    """What one visitor sees: a conversation for each panel, and the question that regenerating asks again."""

    panels: list[Conversation]
    last: Ask | None = None

    def clear(self) -> None:
        """Forget all conversations."""
        self.panels = [Conversation() for _ in self.panels]
        self.last = None

    def take_back(self) -> Ask | None:
        """Remove the last question from the panels that have it, and return it; None if there is none."""
        for panel in self.panels:
            if panel.turns and panel.turns[-1].ask is self.last:
                panel.turns.pop()
        return self.last


def as_markdown(text: str) -> str:
    """Return Markdown that shows what is a tag in HTML, such as `<image>`, as it was written.

    Code keeps its characters, which Markdown shows as they are.
    """
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if i % 2 else escape(part, quote=False) for i, part in enumerate(parts))


def read_ask(text: str, paths) -> Ask:
    """Return a question with its files; ImageError with the file's name for an image that cannot be used.

    Raises ValueError for a question without text and files.
    """
    text = (text or "").strip()
    if not text and not paths:
        raise ValueError("the question is empty; type one, or add an image.")
    return Ask(text, tuple(map(_open, paths or ())))


def _open(path: str) -> Upload:
    """Return an uploaded file; what is neither a sound nor a video by its name must open as an image."""
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    if kind in ("audio", "video"):
        return Upload(path, kind)
    try:
        open_image(Path(path))
    except ImageError as error:
        reason = error.reason.replace(path, os.path.basename(path))
        raise ImageError(os.path.basename(path), reason) from error
    return Upload(path, "image")


def _listed(kinds) -> str:
    """Return the names of kinds for a sentence."""
    return f"{', '.join(kinds)} and text" if kinds else "text alone"
