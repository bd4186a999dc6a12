"""Turn a conversation into a prompt and the character spans of its supervised answers (LLaVA's module)."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.chat_answers import Chat, Written
from llava_lite.conversation.chat_template import Unfit, takes_parts
from llava_lite.conversation.demo import DemoImages
from llava_lite.conversation.layout import Rendered, Turn, check_speakers, write_turns
from llava_lite.conversation.special_tokens import Fence, special_words
from llava_lite.conversation.templates import INPUT_MARK, SINGLE_TURN, TEMPLATES, WITH_EOS, SeparatorStyle

__all__ = [
    "Conversation",
    "PromptOptions",
    "Rendered",
    "SeparatorStyle",
    "alpaca_prompt",
    "conv_templates",
    "default_conversation",
    "get_template",
]


class EmptyPromptError(ValueError):
    """A prompt format that keeps image placeholders alone, and a conversation without any."""


class PromptOptions(NamedTuple):
    """The options of a run or a checkpoint for prompts, under their names in config.json.

    enable_thinking: whether a chat template asks for reasoning (Qwen3). chat_end_token: token that ends the answers of
    a chat template that writes no end token. special_tokens_in_text: a special token spelled in a question or an
    answer becomes that token, as in LLaVA, or is encoded as text. moment: the date that chat templates write, None for
    today. is_strict: raise an error if the answers cannot be located; False leaves out their spans.
    """

    enable_thinking: bool = False
    chat_end_token: str | None = None
    special_tokens_in_text: Literal["token", "text"] = "token"
    moment: datetime | None = None
    is_strict: bool = True


DEFAULT_OPTIONS = PromptOptions()


@dataclass
class Conversation(DemoImages):
    """LLaVA's conversation: a template, and the messages so far.

    system: None, in the template `chat` alone, is the default of the tokenizer's chat template; "" is an empty text.
    messages: [role, text] pairs, the user first; a text of None is an open turn that waits for its answer. LLaVA's
    demo puts a (text, PIL image, mode) tuple in place of the first text.
    offset: number of first messages that are an example of the template and not part of the conversation.
    eos_token: ends a text in the templates of Alpaca and LLaMA2-Accessory, which is the tokenizer's own in `render`.
    """

    system: str | None
    roles: tuple[str, str]
    messages: list
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False
    options: PromptOptions = DEFAULT_OPTIONS
    eos_token: str = "</s>"

    @property
    def is_single_turn(self) -> bool:
        """Whether the template is one of a single question and its answer."""
        return self.sep_style in SINGLE_TURN

    def for_tokenizer(self, tokenizer) -> "Conversation":
        """Return the conversation with the tokenizer's end of text, where the template writes one."""
        eos = getattr(tokenizer, "eos_token", None)
        if self.sep_style not in WITH_EOS or eos in (None, self.eos_token):
            return self
        return replace(self, eos_token=eos, sep2=None if self.sep2 is None else eos)

    def get_prompt(self) -> str:
        """Return the prompt as LLaVA writes it: an empty message is open, and `plain` keeps the instruction."""
        messages = [(role, text or None) for role, text in self._texts()]
        if self.sep_style is SeparatorStyle.PLAIN:
            seps = (self.sep, self.sep2 or self.sep)
            return self.system + "".join(text + seps[i % 2] for i, (_, text) in enumerate(messages) if text)
        return "".join(text for text, _ in write_turns(self, self._turns(messages)))

    def render(self, tokenizer=None) -> Rendered:
        """Return the prompt that training and inference share, with the spans of the answers.

        A span starts right after the prompt for the answer (`ASSISTANT:`, without the space) and ends after the end
        token (`</s>`), so the prompt of an open turn is exactly the text before a span. `plain` and `caption` keep of
        a question only its image placeholders: stage 1 trains on captions. tokenizer: needed by the template `chat`,
        and to keep special tokens as text; it names the end of text of Alpaca's and Accessory's templates. Raises
        ValueError if a chat template does not fit the conversation.
        """
        own = self.for_tokenizer(tokenizer)
        if own is not self:
            return own.render(tokenizer)
        if self.options.special_tokens_in_text == "token":
            return self._rendered(tokenizer)
        if tokenizer is None:
            raise ValueError("special_tokens_in_text='text' needs the tokenizer; call render(tokenizer).")
        words = self.special_words(tokenizer)
        fence = Fence.around([self.system or "", *(text or "" for _, text in self._texts())])
        rendered = self._fenced(fence, words)._rendered(tokenizer)
        text, answers, literals = fence.take(rendered.text, rendered.answers)
        return rendered._replace(text=text, answers=tuple(answers), literals=tuple(literals))

    def special_words(self, tokenizer):
        """Return a pattern for special tokens in a text: the tokenizer's, and the end token of the template."""
        if self.sep_style is not SeparatorStyle.CHAT:
            return special_words(tokenizer, (self.sep2 or self.sep,))
        chat = Chat(tokenizer, self.options.moment, self.options.enable_thinking, self.options.chat_end_token)
        return special_words(tokenizer, tuple(token.strip() for token in chat.end_tokens))

    def _fenced(self, fence, words) -> "Conversation":
        """Return a copy whose messages and system text have fenced special tokens; the template's own stay."""
        messages = [[role, text and fence.put(text, words)] for role, text in self._texts()]
        if self.system is None:
            return replace(self, messages=messages)
        opening, newline, system = self.system.partition("\n")
        if self.sep_style is not SeparatorStyle.MPT:
            opening, newline, system = "", "", self.system
        return replace(self, messages=messages, system=opening + newline + fence.put(system, words))

    def _rendered(self, tokenizer) -> Rendered:
        if self.sep_style is SeparatorStyle.CHAT:
            text, spans = self._chat(tokenizer)
            # Prompts of multimodal models go through a processor, which adds BOS if it is missing.
            has_bos = not takes_parts(tokenizer.get_chat_template())
            return Rendered(text, spans, add_special_tokens=not has_bos, cuts_prompts=True)
        text, answers = "", []
        for piece, is_supervised in write_turns(self, self._turns(self._texts())):
            if is_supervised:
                answers.append((len(text), len(text) + len(piece)))
            text += piece
        # The prompt of `caption` is empty where images do not stand in the text: BOS alone.
        if not text and self.sep_style is not SeparatorStyle.CAPTION:
            raise EmptyPromptError(
                "the prompt is empty: the template 'plain' keeps of a question only its <image> placeholders. Show an "
                "image, or choose another template (--version, --conv-mode)."
            )
        return Rendered(text, tuple(answers))

    def _chat(self, tokenizer) -> Written:
        """Return the conversation by the tokenizer's own chat template."""
        options, messages = self.options, self._texts()
        chat = Chat(tokenizer, options.moment, options.enable_thinking, options.chat_end_token)
        try:
            if messages and messages[-1][1] is None:
                return chat.prompt(self.system, messages[:-1])
            return chat.write(self.system, messages, options.is_strict)
        except Unfit as reason:
            raise ValueError(f"the chat template of {tokenizer.name_or_path!r} {reason}.") from reason

    def with_turns(self, turns, system: str | None = None) -> "Conversation":
        """Return a copy with only `turns` as messages: ("human" | "gpt", text) pairs; the last text may be None.

        system: replaces the template's system text; None keeps it. A first turn from gpt is dropped, as in LLaVA.
        Raises ValueError unless human and gpt alternate.
        """
        turns = list(turns)
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        if not turns:
            raise ValueError("the conversation has no turn from human; expected turns from human and gpt.")
        check_speakers(turns)
        messages = [[self.roles[i % 2], text] for i, (_, text) in enumerate(turns)]
        system = self.system if system is None else _with_system(self.system or "", system)
        return replace(self, messages=messages, offset=0, system=system)

    def _texts(self) -> list[tuple[str, str | None]]:
        """Return the messages with the demo's tuple as text."""
        texts = [(role, text[0] if isinstance(text, tuple) else text) for role, text in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return texts
        role, text = texts[0][0], texts[0][1].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            shown = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
            return [*shown, (role, text), *texts[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *texts[1:]]

    def _turns(self, messages) -> list[Turn]:
        """Return (role, text) messages as turns of the template; every second message is an answer."""
        return [
            Turn(role, text, i % 2 == 1, is_supervised=i >= self.offset) for i, (role, text) in enumerate(messages)
        ]

    def append_message(self, role, message) -> None:
        """Add a turn; None leaves it open for the answer."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return a conversation whose messages can change without changing this one's."""
        return replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict:
        """Return the fields that a log keeps, images left out."""
        keys = ("system", "roles", "messages", "offset", "sep", "sep2")
        messages = [[role, text[0] if isinstance(text, tuple) else text] for role, text in self.messages]
        return {key: getattr(self, key) for key in keys} | {"messages": messages}


def _with_system(template_text: str, system: str) -> str:
    """Return a template's system text with other words; its first line stays if it is a tag (<|im_start|>system)."""
    opening, newline, _ = template_text.partition("\n")
    return opening + newline + system if opening.startswith("<|") else system


conv_templates = {name: Conversation(**fields) for name, fields in TEMPLATES.items()}
default_conversation = conv_templates["vicuna_v1"]


def alpaca_prompt(instruction: str, input: str | None = None, name: str = "alpaca", blank_is_none: bool = True) -> str:
    """Return the prompt of an instruction by a template of Alpaca's kind, up to where the answer begins.

    input: what the instruction is about. name: alpaca, alpaca_short, question_generation, caption or bare.
    blank_is_none: an input of spaces is none (Alpaca, ImageBind-LLM); False: it has its heading (LLaMA-Adapter V2).
    """
    template = get_template(name)
    if not template.is_single_turn:
        known = ", ".join(name for name, one in conv_templates.items() if one.is_single_turn)
        raise ValueError(f"the template {name!r} is not one of a single instruction; known: {known}.")
    question = join_input(instruction, input, blank_is_none)
    return template.with_turns([("human", question), ("gpt", None)]).render().text


def join_input(instruction: str, input: str | None, blank_is_none: bool = True) -> str:
    """Return the question of an instruction and its input, as Alpaca's templates write them."""
    if input is None or (blank_is_none and not input.strip()):
        return instruction
    return instruction + INPUT_MARK + input


def get_template(name, **options) -> Conversation:
    """Return a new copy of a template; ValueError with the known names if there is none.

    options: fields of PromptOptions.
    """
    if name not in conv_templates:
        raise ValueError(f"unknown conversation template {name!r}; known: {', '.join(conv_templates)}.")
    return replace(conv_templates[name].copy(), options=PromptOptions(**options))
