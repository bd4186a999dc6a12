"""Find the end mark of a prompt format, by which a model stops: its text, and its ids in a tokenizer."""

from typing import NamedTuple

from llava_lite.chat_answers import Chat
from llava_lite.chat_template import Unfit
from llava_lite.conversation import Conversation, SeparatorStyle, conv_templates, get_template

# Text by design: `###` of LLaVA's first version, the line break behind a caption.
_TEXT_STYLES = (SeparatorStyle.SINGLE, SeparatorStyle.PLAIN)


class EndMark(NamedTuple):
    """What ends an answer. text: "" where nothing does; ids: tokens that a model stops at, none for a mark of text."""

    text: str
    ids: tuple[int, ...] = ()


def end_mark_of(template: Conversation, tokenizer) -> EndMark:
    """Return the end mark of a template; ids: of a chat template those after earlier answers too."""
    if template.sep_style is not SeparatorStyle.CHAT:
        text = mark_text(template)
        token = None if template.sep_style in _TEXT_STYLES else one_token(text, tokenizer)
        return EndMark(text, () if token is None else (token,))
    options = template.options
    texts = Chat(tokenizer, options.moment, options.enable_thinking, options.chat_end_mark).end_marks
    ids = [last_id(text, tokenizer) for text in texts]
    return EndMark(texts[0].strip() if texts else "", tuple(dict.fromkeys(ids)))


def end_mark_of_config(config, tokenizer) -> EndMark:
    """Return the end mark of the prompt format that a config names, with what it chose beside; none without one."""
    if config.conv_template is None:
        return EndMark("")
    chosen = {key: getattr(config, key) for key in ("enable_thinking", "chat_end_mark")}
    return end_mark_of(get_template(config.conv_template, **chosen), tokenizer)


def mark_text(template: Conversation) -> str:
    """Return the text of a named template's end mark, without blanks around it; a line break alone is one."""
    mark = template.sep2 if template.sep2 is not None else template.sep
    # A blank alone ends nothing: every other word begins with one. A line break ends a caption.
    return mark.strip() or mark.strip(" ")


def one_token(text: str, tokenizer) -> int | None:
    """Return the id of a text that is one token of a tokenizer after other text too, None if it is none."""
    if not text:
        return None
    last = tokenizer.encode(f"a{text}", add_special_tokens=False)[-1]
    return last if tokenizer.decode([last]) == text else None


def last_id(text: str, tokenizer) -> int:
    """Return the id of the token that a mark of tokens ends with; a line break after it stops nothing."""
    return tokenizer.encode(text.strip(), add_special_tokens=False)[-1]


def refuse_unfit(template: Conversation, tokenizer, name: str) -> None:
    """Raise ValueError if the end mark of a template is not one token of a tokenizer; the message lists what fits.

    name: of the template, for the message. A chat template fits if answers with or without reasoning can be located.
    """
    if template.sep_style is SeparatorStyle.CHAT:
        reason = _why_no_chat(template, tokenizer)
        if reason is not None:
            raise ValueError(f"--version {name}: {reason}. {_what_fits(tokenizer)}")
        return
    mark = mark_text(template)
    if template.sep_style in _TEXT_STYLES or one_token(mark, tokenizer) is not None:
        return
    pieces = tokenizer.encode(mark, add_special_tokens=False)
    raise ValueError(
        f"--version {name} ends an answer with {mark!r}, which is not one token of this tokenizer but {len(pieces)}: "
        f"the model would not learn where to stop. {_what_fits(tokenizer)}"
    )


def _why_no_chat(template: Conversation, tokenizer) -> str | None:
    """Return why no answer can be located in a tokenizer's chat template, None if it can."""
    options = template.options
    if options.chat_end_mark is not None and one_token(options.chat_end_mark, tokenizer) is None:
        return f"--chat_end_mark {options.chat_end_mark} is no token of this tokenizer"
    reasons = []
    for thinks in (False, True):
        try:
            Chat(tokenizer, options.moment, thinks, options.chat_end_mark).format(thinks)
        except Unfit as reason:
            reasons.append(f"the chat template of {tokenizer.name_or_path!r} {reason}")
        except ValueError as error:
            reasons.append(str(error).rstrip("."))
    return reasons[0] if len(reasons) == 2 else None


def _what_fits(tokenizer) -> str:
    """Return a sentence that names the templates whose end mark a tokenizer has."""
    fit = [name for name in conv_templates if _fits(name, tokenizer)]
    by_text = [name for name, known in conv_templates.items() if known.sep_style is SeparatorStyle.SINGLE]
    named = f"{', '.join(fit)}; " if fit else ""
    return f"Templates that fit it: {named}with the text '###' as end mark {', '.join(by_text)}; for captions plain."


def _fits(name, tokenizer) -> bool:
    template = get_template(name)
    if template.sep_style is SeparatorStyle.CHAT:
        has_own = getattr(tokenizer, "chat_template", None) is not None
        return has_own and _why_no_chat(template, tokenizer) is None
    return template.sep_style not in _TEXT_STYLES and one_token(mark_text(template), tokenizer) is not None


def end_ids(generation_config, tokenizer, ids=()) -> list[int]:
    """Return the ids that end an answer: those of a generation config, the tokenizer's end of text, and `ids`."""
    own = generation_config.eos_token_id
    own = list(own) if isinstance(own, (list, tuple)) else [own]
    return [token for token in dict.fromkeys([*own, tokenizer.eos_token_id, *ids]) if token is not None]


def stop_arguments(mark: EndMark, ends: list[int], tokenizer) -> dict:
    """Return the keywords of `generate` that stop at an end mark, and at the ids of `ends` as before."""
    token = one_token(mark.text, tokenizer)
    ids = mark.ids or (() if token is None else (token,))
    arguments = {"eos_token_id": sorted({*ends, *ids})}
    if mark.text and not ids:
        arguments |= {"stop_strings": [mark.text], "tokenizer": tokenizer}
    return arguments


def add_end_mark(generation_config, mark: EndMark, tokenizer) -> None:
    """Let a generation config end an answer at an end mark, beside where it ended one before."""
    ends = end_ids(generation_config, tokenizer, mark.ids)
    if ends:
        generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
