"""Turn a conversation into a prompt and the character spans of the answers that are supervised."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, NamedTuple

from llava_lite.chat_answers import Chat, Written
from llava_lite.chat_template import Unfit, takes_parts
from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_lite.special_tokens import Fence, special_words
from llava_lite.templates import TEMPLATES, SeparatorStyle

__all__ = [
    "Conversation",
    "PromptOptions",
    "Rendered",
    "SeparatorStyle",
    "conv_templates",
    "default_conversation",
    "get_template",
    "place_images",
]


class Rendered(NamedTuple):
    """A prompt and what of it is supervised.

    answers: [start, end) character spans of `text`: each answer with its end mark.
    add_special_tokens: False where `text` already holds all of them, as a chat template writes it.
    literals: [start, end) of special tokens that are text and no tokens.
    cuts_prompts: no token may reach into an answer, so that what stands before it is tokenised as the prompt is alone.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    add_special_tokens: bool = True
    literals: tuple[tuple[int, int], ...] = ()
    cuts_prompts: bool = False


class PromptOptions(NamedTuple):
    """The options of a run or a checkpoint about prompts, under their names in config.json.

    enable_thinking: whether a chat template asks for reasoning (Qwen3). chat_end_mark: token that ends the answers of
    a chat template that writes no end mark. special_tokens_in_text: a special token spelled in a question or an answer
    becomes that token, as in LLaVA, or is encoded as text. moment: what chat templates with a date write, None for
    today. is_strict: refuse a conversation whose answers cannot be located; False leaves out their spans.
    """

    enable_thinking: bool = False
    chat_end_mark: str | None = None
    special_tokens_in_text: Literal["token", "text"] = "token"
    moment: datetime | None = None
    is_strict: bool = True


DEFAULT_OPTIONS = PromptOptions()


@dataclass
class Conversation:
    """LLaVA's conversation: a template, and the messages said so far.

    messages: [role, text] pairs, the user first; a text of None is an open turn that waits for its answer. LLaVA's
    demo puts a (text, PIL picture, mode) tuple in place of the first text.
    offset: the first messages that are a worked example of the template and no part of the talk.
    """

    system: str
    roles: tuple[str, str]
    messages: list
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False
    options: PromptOptions = DEFAULT_OPTIONS

    def get_prompt(self) -> str:
        """Return the prompt as LLaVA writes it: an empty message is an open one, and `plain` keeps the instruction."""
        messages = [(role, text or None) for role, text in self._texts()]
        if self.sep_style is SeparatorStyle.PLAIN:
            seps = (self.sep, self.sep2 or self.sep)
            return self.system + "".join(text + seps[i % 2] for i, (_, text) in enumerate(messages) if text)
        return "".join(text for text, _ in self._pieces(messages))

    def render(self, tokenizer=None) -> Rendered:
        """Return the prompt that training and inference share, with the spans of the answers.

        A span starts right after the words that ask for the answer (`ASSISTANT:`, without the blank) and ends after
        the end mark (`</s>`), so that the prompt of an open turn is exactly what stands before a span. `plain` keeps
        of a question only its images: stage 1 learns captions. tokenizer: needed by the template `chat`, and to keep
        special tokens as text. Raises ValueError where a chat template does not fit the conversation.
        """
        if self.options.special_tokens_in_text == "token":
            return self._rendered(tokenizer)
        if tokenizer is None:
            raise ValueError("special_tokens_in_text='text' needs the tokenizer; call render(tokenizer).")
        words = self.special_words(tokenizer)
        fence = Fence.around([self.system, *(text or "" for _, text in self._texts())])
        rendered = self._fenced(fence, words)._rendered(tokenizer)
        text, answers, literals = fence.take(rendered.text, rendered.answers)
        return rendered._replace(text=text, answers=tuple(answers), literals=tuple(literals))

    def special_words(self, tokenizer):
        """Return a pattern for special tokens in a text: the tokenizer's, and the end mark of the template."""
        if self.sep_style is not SeparatorStyle.CHAT:
            return special_words(tokenizer, (self.sep2 or self.sep,))
        chat = Chat(tokenizer, self.options.moment, self.options.enable_thinking, self.options.chat_end_mark)
        return special_words(tokenizer, tuple(mark.strip() for mark in chat.end_marks))

    def _fenced(self, fence, words) -> "Conversation":
        """Return a copy with the special tokens of its contents fenced; the template's own text stays as it is."""
        messages = [[role, text and fence.put(text, words)] for role, text in self._texts()]
        opening, newline, system = self.system.partition("\n")
        if self.sep_style is not SeparatorStyle.MPT:
            opening, newline, system = "", "", self.system
        return replace(self, messages=messages, system=opening + newline + fence.put(system, words))

    def _rendered(self, tokenizer) -> Rendered:
        if self.sep_style is SeparatorStyle.CHAT:
            text, spans = self._chat(tokenizer)
            # What a model that sees is asked goes through a processor, which puts BOS in front if it is not there.
            has_bos = not takes_parts(tokenizer.get_chat_template())
            return Rendered(text, spans, add_special_tokens=not has_bos, cuts_prompts=True)
        text, answers = "", []
        for piece, is_learned in self._pieces(self._texts()):
            if is_learned:
                answers.append((len(text), len(text) + len(piece)))
            text += piece
        if not text:
            raise ValueError(
                "nothing is left of this conversation: the template 'plain' keeps of a question only its <image> "
                "marks. Show a picture, or choose another template (--version, --conv-mode)."
            )
        return Rendered(text, tuple(answers))

    def _chat(self, tokenizer) -> Written:
        """Return the conversation by the tokenizer's own chat template."""
        options, messages = self.options, self._texts()
        chat = Chat(tokenizer, options.moment, options.enable_thinking, options.chat_end_mark)
        try:
            if messages and messages[-1][1] is None:
                return chat.prompt(self.system, messages[:-1])
            return chat.write(self.system, messages, options.is_strict)
        except Unfit as reason:
            raise ValueError(f"the chat template of {tokenizer.name_or_path!r} {reason}.") from reason

    def with_turns(self, turns, system: str | None = None) -> "Conversation":
        """Return a copy that holds `turns` alone: ("human" | "gpt", text) pairs, or None as the last text.

        system: replaces the words of the template's system text; None keeps them. A first turn from gpt is dropped,
        as LLaVA does. Raises ValueError where the speakers do not take turns.
        """
        turns = list(turns)
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        if not turns:
            raise ValueError("the conversation has no turn from human; expected human and gpt in turns.")
        for i, (speaker, _) in enumerate(turns):
            expected = ("human", "gpt")[i % 2]
            if speaker != expected:
                raise ValueError(
                    f"turn {i + 1} of {len(turns)} is from {speaker!r}, expected {expected!r}: "
                    "human and gpt must take turns, human first."
                )
        messages = [[self.roles[i % 2], text] for i, (_, text) in enumerate(turns)]
        system = self.system if system is None else _with_system(self.system, system)
        return replace(self, messages=messages, offset=0, system=system)

    def _texts(self) -> list[tuple[str, str | None]]:
        """Return the messages with the demo's tuples turned into text."""
        texts = [(role, text[0] if isinstance(text, tuple) else text) for role, text in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return texts
        role, text = texts[0][0], texts[0][1].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            shown = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
            return [*shown, (role, text), *texts[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *texts[1:]]

    def _pieces(self, messages) -> Iterator[tuple[str, bool]]:
        """Yield (text, learned or not); together the texts are the prompt."""
        if self.sep_style is SeparatorStyle.SINGLE:
            yield self.system + self.sep, False
            yield from self._spoken(messages, ":", " ", (self.sep, self.sep))
        elif self.sep_style is SeparatorStyle.TWO:
            yield self.system + self.sep, False
            yield from self._spoken(messages, ":", " ", (self.sep, self.sep2))
        elif self.sep_style is SeparatorStyle.MPT:
            yield self.system + self.sep, False
            yield from self._spoken(messages, "", "", (self.sep, self.sep))
        elif self.sep_style is SeparatorStyle.LLAMA_2:
            yield from self._instructed(messages)
        elif self.sep_style is SeparatorStyle.PLAIN:
            yield from self._captioned(messages)
        else:
            raise ValueError("the template 'chat' is the tokenizer's own: call render(tokenizer), not get_prompt().")

    def _spoken(self, messages, colon, blank, seps):
        for i, (role, text) in enumerate(messages):
            yield role + colon, False
            if text is not None:
                yield blank + text + seps[i % 2], self._is_answer(i)

    def _instructed(self, messages):
        if messages and messages[0][1] is None:
            raise ValueError("a Llama-2 template needs a first message from the user; got an open one.")
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        for i, (_, text) in enumerate(messages):
            if text is None:
                continue
            if i % 2 == 0:
                # No mark before the first turn: the tokenizer writes BOS itself.
                yield f"{self.sep}[INST] {text} [/INST]" if i else f"[INST] {system}{text} [/INST]", False
            else:
                yield f" {text} {self.sep2}", self._is_answer(i)

    def _captioned(self, messages):
        yield self.system, False
        for i, (_, text) in enumerate(messages):
            if text is None:
                continue
            if i % 2 == 0:
                yield DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN), False
            else:
                yield text + self.sep, self._is_answer(i)

    def _is_answer(self, i) -> bool:
        return i % 2 == 1 and i >= self.offset

    def append_message(self, role, message) -> None:
        """Add a turn; None leaves it open for the answer."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return a conversation whose messages can change without changing this one's."""
        return replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict:
        """Return the fields that a log keeps, pictures left out."""
        keys = ("system", "roles", "messages", "offset", "sep", "sep2")
        messages = [[role, text[0] if isinstance(text, tuple) else text] for role, text in self.messages]
        return {key: getattr(self, key) for key in keys} | {"messages": messages}

    def process_image(
        self, image, image_process_mode, return_pil=False, image_format="PNG", max_len=1344, min_len=672
    ):
        """Return the picture (PIL, or base64 text) made fit for the demo: `Pad`, `Crop`, `Default` or `Resize`."""
        from llava_lite.mm_utils import expand2square

        known = ("Default", "Crop", "Pad", "Resize")
        if image_process_mode not in known:
            raise ValueError(f"unknown image_process_mode {image_process_mode!r}; known: {', '.join(known)}.")
        if image_process_mode == "Pad":
            image = expand2square(image, (122, 116, 104))
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        long, short = max(image.size), min(image.size)
        if long > max_len:
            ratio = long / short
            new_short = max(1, int(min(max_len / ratio, min_len, short)))
            new_long = int(new_short * ratio)
            image = image.resize((new_long, new_short) if image.width >= image.height else (new_short, new_long))
        return image if return_pil else _base64(image, image_format)

    def get_images(self, return_pil=False) -> list:
        """Return the pictures of the talk in order, as PIL or as base64 text."""
        shown = [text for _, text in self.messages[self.offset :: 2] if isinstance(text, tuple)]
        return [self.process_image(image, mode, return_pil=return_pil) for _, image, mode in shown]

    def to_gradio_chatbot(self) -> list[list]:
        """Return [question, answer] pairs; a picture is an HTML tag before its question."""
        pairs = []
        for i, (_, text) in enumerate(self.messages[self.offset :]):
            if i % 2 == 1:
                pairs[-1][1] = text
            elif isinstance(text, tuple):
                data = self.process_image(text[1].convert("RGB"), "Default", image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
                pairs.append([tag + text[0].replace(DEFAULT_IMAGE_TOKEN, "").strip(), None])
            else:
                pairs.append([text, None])
        return pairs


def _with_system(template_text: str, system: str) -> str:
    """Replace the words of a system text and keep the line that opens it, such as "<|im_start|>system"."""
    opening, newline, _ = template_text.partition("\n")
    return opening + newline + system if opening.startswith("<|") else system


def _base64(image, image_format) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


def place_images(turns, template, use_start_end=False) -> tuple[tuple[str, str | None], ...]:
    """Return the (speaker, text) turns of a record with pictures, each `<image>` where the model is to read it.

    A turn with one picture gets it in front, on a line of its own, as LLaVA does; several stay where they stand, as
    in MoE-LLaVA. template: a Conversation; one with mmtag wraps each in `<Image></Image>`, and `use_start_end` wraps
    each in `<im_start><im_end>`. Not for records without pictures: there `<image>` is plain text.
    """
    mark = DEFAULT_IMAGE_TOKEN
    if use_start_end:
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    if "mmtag" in template.version:
        mark = f"<Image>{mark}</Image>"
    placed = []
    for speaker, text in turns:
        if text is not None and text.count(DEFAULT_IMAGE_TOKEN) == 1:
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        placed.append((speaker, text and text.replace(DEFAULT_IMAGE_TOKEN, mark)))
    return tuple(placed)


conv_templates = {name: Conversation(**fields) for name, fields in TEMPLATES.items()}
default_conversation = conv_templates["vicuna_v1"]


def get_template(name, **options) -> Conversation:
    """Return a fresh copy of the template; ValueError with the known names if there is none.

    options: fields of PromptOptions.
    """
    if name not in conv_templates:
        raise ValueError(f"unknown conversation template {name!r}; known: {', '.join(conv_templates)}.")
    return replace(conv_templates[name].copy(), options=PromptOptions(**options))
