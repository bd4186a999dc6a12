"""Find the end token of a template, at which a model stops: its text, and its ids in a tokenizer."""

from typing import NamedTuple

from llava_lite.conversation import Conversation, SeparatorStyle, conv_templates, get_template
from llava_lite.conversation.chat_answers import Chat
from llava_lite.conversation.chat_template import Unfit

# End tokens that are text and not tokens: `###` of LLaVA's first version, the line break after a caption.
_TEXT_STYLES = (SeparatorStyle.SINGLE, SeparatorStyle.PLAIN)


def ends_with_text(template: Conversation) -> bool:
    """Return whether the answers of a named template end with a text, and not with a token."""
    is_accessory = template.sep_style is SeparatorStyle.ACCESSORY and template.sep2 is None
    return is_accessory or template.sep_style in _TEXT_STYLES


class EndToken(NamedTuple):
    """The end of an answer. text: "" for none; ids: tokens at which a model stops, () if the end is text."""

    text: str
    ids: tuple[int, ...] = ()


def get_end_token(template: Conversation, tokenizer) -> EndToken:
    """Return the end token of a template; the ids of a chat template include those after earlier answers."""
    if template.sep_style is not SeparatorStyle.CHAT:
        text = get_end_text(template.for_tokenizer(tokenizer))
        token = None if ends_with_text(template) else one_token(text, tokenizer)
        return EndToken(text, () if token is None else (token,))
    options = template.options
    texts = Chat(tokenizer, options.moment, options.enable_thinking, options.chat_end_token).end_tokens
    # A line break after an end token does not stop a model.
    ids = [tokenizer.encode(text.strip(), add_special_tokens=False)[-1] for text in texts]
    return EndToken(texts[0].strip() if texts else "", tuple(dict.fromkeys(ids)))


def get_config_end_token(config, tokenizer) -> EndToken:
    """Return the end token of a config's template and options; an empty one if it names no template."""
    if config.conv_template is None:
        return EndToken("")
    chosen = {key: getattr(config, key) for key in ("enable_thinking", "chat_end_token")}
    return get_end_token(get_template(config.conv_template, **chosen), tokenizer)


def get_end_text(template: Conversation) -> str:
    """Return the text of a named template's end token, without spaces around it; it may be a line break."""
    end = template.sep2 if template.sep2 is not None else template.sep
    # A space cannot end an answer: many words begin with one. A line break ends a caption.
    return end.strip() or end.strip(" ")


def one_token(text: str, tokenizer) -> int | None:
    """Return the id of a text that is one token, also after other text; None if it is not."""
    if not text:
        return None
    last = tokenizer.encode(f"a{text}", add_special_tokens=False)[-1]
    return last if tokenizer.decode([last]) == text else None


def check_end_token(template: Conversation, tokenizer, name: str) -> None:
    """Raise ValueError if the end token of a template is not one token of a tokenizer; it lists templates that fit.

    name: of the template, for the message. A chat template fits if answers with or without reasoning can be located.
    """
    if template.sep_style is SeparatorStyle.CHAT:
        reason = _why_no_chat(template, tokenizer)
        if reason is not None:
            raise ValueError(f"--version {name}: {reason}. {_what_fits(tokenizer)}")
        return
    end = get_end_text(template.for_tokenizer(tokenizer))
    if ends_with_text(template) or one_token(end, tokenizer) is not None:
        return
    pieces = tokenizer.encode(end, add_special_tokens=False)
    raise ValueError(
        f"--version {name} ends an answer with {end!r}, which is not one token of this tokenizer but {len(pieces)}: "
        f"the model would not learn where to stop. {_what_fits(tokenizer)}"
    )


def _why_no_chat(template: Conversation, tokenizer) -> str | None:
    """Return why answers cannot be located in a tokenizer's chat template, None if they can."""
    options = template.options
    if options.chat_end_token is not None and one_token(options.chat_end_token, tokenizer) is None:
        return f"--chat_end_token {options.chat_end_token} is not a token of this tokenizer"
    reasons = []
    for thinks in (False, True):
        try:
            Chat(tokenizer, options.moment, thinks, options.chat_end_token).format(thinks)
        except Unfit as reason:
            reasons.append(f"the chat template of {tokenizer.name_or_path!r} {reason}")
        except ValueError as error:
            reasons.append(str(error).rstrip("."))
    return reasons[0] if len(reasons) == 2 else None


def _what_fits(tokenizer) -> str:
    """Return a sentence with the templates whose end token a tokenizer has."""
    fit = [name for name in conv_templates if _fits(name, tokenizer)]
    by_text = [name for name, known in conv_templates.items() if ends_with_text(known) and known.sep == "###"]
    named = f"{', '.join(fit)}; " if fit else ""
    return f"Templates that fit it: {named}with the text '###' as end token {', '.join(by_text)}; for captions plain."


def _fits(name, tokenizer) -> bool:
    template = get_template(name).for_tokenizer(tokenizer)
    if template.sep_style is SeparatorStyle.CHAT:
        return _why_no_chat(template, tokenizer) is None
    return not ends_with_text(template) and one_token(get_end_text(template), tokenizer) is not None


def end_ids(generation_config, tokenizer, ids=()) -> list[int]:
    """Return the ids that end an answer: those of a generation config, the tokenizer's end of text, and `ids`."""
    own = generation_config.eos_token_id
    own = list(own) if isinstance(own, (list, tuple)) else [own]
    return [token for token in dict.fromkeys([*own, tokenizer.eos_token_id, *ids]) if token is not None]


def stop_arguments(end_token: EndToken, ends: list[int], tokenizer) -> dict:
    """Return the arguments of `generate` that stop at an end token, and at the ids `ends`."""
    token = one_token(end_token.text, tokenizer)
    ids = end_token.ids or (() if token is None else (token,))
    arguments = {"eos_token_id": sorted({*ends, *ids})}
    if end_token.text and not ids:
        arguments |= {"stop_strings": [end_token.text], "tokenizer": tokenizer}
    return arguments


def add_end_token(generation_config, end_token: EndToken, tokenizer) -> None:
    """Add an end token to the ids at which a generation config ends an answer."""
    ends = end_ids(generation_config, tokenizer, end_token.ids)
    if ends:
        generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
