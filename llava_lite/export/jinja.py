"""Turn a prompt format into the Jinja chat template that writes the same prompts.

With it, readers that know messages and no formats of ours (transformers' own processors, vLLM, SGLang) ask a model as
it was trained. A part of a message that is no text is an image; all else is as in `place_images` and `render`.
"""

import json
import re

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation import SeparatorStyle, get_template
from llava_lite.conversation.chat_template import takes_images
from llava_lite.conversation.images import get_placeholder
from llava_lite.conversation.templates import INPUT_MARK, WITH_EOS, WITH_INPUT

# Collects the messages in ns.conversation with text for content, and the text of a system message in ns.system.
_READ = """\
{%- set ns = namespace(conversation=[], text='', system=SYSTEM, prompt='', first=true) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set ns.text = message['content'] -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for part in message['content'] -%}
{%- set words = part['text'] if part['type'] == 'text' else IMAGE -%}
{%- set ns.text = ns.text + ('' if loop.first else '\\n') + words -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
READ_SYSTEM
{%- else -%}
{%- if ns.text.count(IMAGE) == 1 -%}
{%- set ns.text = (IMAGE + '\\n' + ns.text.replace(IMAGE, '').strip()).strip() -%}
{%- endif -%}
WRAP
{%- set ns.conversation = ns.conversation + [{'role': message['role'], 'content': ns.text}] -%}
{%- endif -%}
{%- endfor -%}
"""
# Where `_READ` keeps a message, and what closes an answer before it.
_KEPT = "{%- set ns.conversation = ns.conversation + [{'role': message['role'], 'content': ns.text}] -%}"
_CLOSED = """\
{%- if message['role'] == 'assistant' -%}
{%- set ns.text = ns.text + END_TOKEN -%}
{%- endif -%}
"""
_SPOKEN = """\
{%- set ns.prompt = OPENING -%}
{%- for message in ns.conversation -%}
{%- if message['role'] == 'user' -%}
{%- set ns.prompt = ns.prompt + USER + SPACE + message['content'] + AFTER -%}
{%- else -%}
{%- set ns.prompt = ns.prompt + ASSISTANT + SPACE + message['content'] + END -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- set ns.prompt = ns.prompt + ASSISTANT -%}
{%- endif -%}
"""
# An instruction with an input has another opening.
_INSTRUCT = (
    """\
{%- for message in ns.conversation -%}
{%- if ns.first and message['role'] == 'user' -%}
{%- set ns.first = false -%}
{%- if ns.system and ns.system == SYSTEM and MARK in message['content'] -%}
{%- set ns.system = PAIRED -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
    + _SPOKEN
)
_ENDED = """\
{%- if ns.conversation and ns.conversation[-1]['role'] == 'assistant' and not add_generation_prompt -%}
{%- set ns.prompt = ns.prompt + EOS -%}
{%- endif -%}
"""
_INSTRUCTED = """\
{%- for message in ns.conversation -%}
{%- if message['role'] != 'user' -%}
{%- set ns.prompt = ns.prompt + ' ' + message['content'] + ' ' + END -%}
{%- elif ns.first -%}
{%- set words = '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' if ns.system else '' -%}
{%- set ns.prompt = '[INST] ' + words + message['content'] + ' [/INST]' -%}
{%- set ns.first = false -%}
{%- else -%}
{%- set ns.prompt = ns.prompt + SEP + '[INST] ' + message['content'] + ' [/INST]' -%}
{%- endif -%}
{%- endfor -%}
"""
_CAPTIONED = """\
{%- set ns.prompt = ns.system -%}
{%- for message in ns.conversation -%}
{%- if message['role'] == 'user' -%}
{%- set ns.prompt = ns.prompt + IMAGE * message['content'].count(IMAGE) -%}
{%- else -%}
{%- set ns.prompt = ns.prompt + message['content'] + END -%}
{%- endif -%}
{%- endfor -%}
"""
_WRITE = "{{- ns.prompt -}}"
_WRITE_WITH_SPACES = """\
{%- for part in ns.prompt.split(IMAGE) -%}
{{- ('' if loop.first else IMAGE) + ('' if loop.first or not part or part[0] == ' ' else ' ') + part -}}
{%- endfor -%}
"""
_TEXT_WITH_SPACES = """\
{%- set parts = ns.text.split(IMAGE) -%}
{%- set ns.text = parts[0] -%}
{%- for part in parts[1:] -%}
{%- set ns.text = ns.text + IMAGE + ('' if not part or part[0] == ' ' else ' ') + part -%}
{%- endfor -%}"""
_STYLES = {
    SeparatorStyle.SINGLE: _SPOKEN,
    SeparatorStyle.TWO: _SPOKEN,
    SeparatorStyle.MPT: _SPOKEN,
    SeparatorStyle.LLAMA_2: _INSTRUCTED,
    SeparatorStyle.PLAIN: _CAPTIONED,
    SeparatorStyle.CAPTION: _CAPTIONED,
    SeparatorStyle.INSTRUCT: _INSTRUCT,
    SeparatorStyle.ACCESSORY: _SPOKEN,
}


def write_jinja(conv_template, use_im_start_end=False, own=None, space_after_image=False, end_token=None) -> str:
    """Return the Jinja text of a format of `conv_templates`.

    own: the tokenizer's chat template (`own_template`), which the format `chat` hands the messages on to, with
    end_token after each answer if it writes none. space_after_image: write a space after every `<image>` that has
    none. A tokenizer that puts a space before the first word of a text only (Llama's, legacy=False) reads the text
    after an image as LLaVA does, as a text of its own, only if the space is written.
    """
    template = get_template(conv_template)
    is_chat = template.sep_style is SeparatorStyle.CHAT
    if is_chat and own is None:
        raise ValueError("the format 'chat' is the tokenizer's own chat template, and this tokenizer has none.")
    if is_chat and takes_images(own) and not space_after_image:
        return own
    body = "" if is_chat else _STYLES[template.sep_style]
    if template.sep_style is SeparatorStyle.ACCESSORY and template.sep2 is None:
        body += _ENDED
    if is_chat:
        # Its own template starts from messages; spaces are put into their texts.
        write = "{%- set messages = ns.conversation -%}\n" + own
    else:
        write = _WRITE_WITH_SPACES if space_after_image else _WRITE
    text = _READ.replace("READ_SYSTEM", _system(template, is_chat))
    text = text.replace("WRAP", _wrap(template, use_im_start_end, space_after_image and is_chat))
    # In one pass, since a system text may hold one of the names.
    words = _words(template)
    names = re.compile(rf"\b({'|'.join(words)})\b")
    text, body = (names.sub(lambda match: words[match[0]], part) for part in (text, body))
    if is_chat and end_token is not None:
        # After the text of a message; only now, since an end token may contain one of the names.
        text = text.replace(_KEPT, _CLOSED.replace("END_TOKEN", _quoted(end_token)) + _KEPT)
    return text + body + (write if is_chat else names.sub(lambda match: words[match[0]], write))


def _words(template) -> dict[str, str]:
    """Return what the capital names stand for, as Jinja literals."""
    style, sep = template.sep_style, template.sep
    is_accessory = style is SeparatorStyle.ACCESSORY
    has_colon = is_accessory or style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
    by_lines = is_accessory and template.sep2 is None
    has_own_end = style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2) or (style in WITH_EOS and not by_lines)
    after = f"\n{sep}" if by_lines else sep
    user, assistant = (" " * is_accessory + role + (":" if has_colon else "") for role in template.roles)
    words = {
        "SYSTEM": template.system,
        "IMAGE": DEFAULT_IMAGE_TOKEN,
        "USER": user,
        "ASSISTANT": assistant,
        "SPACE": " " if has_colon else "",
        "SEP": sep,
        "AFTER": after,
        "END": template.sep2 if has_own_end else after,
        "MARK": INPUT_MARK,
        "PAIRED": WITH_INPUT.get(template.system),
    }
    words = {name: _quoted(text) for name, text in words.items()}
    words["OPENING"] = f"ns.system + {_quoted(f'{chr(10) * 2}{sep}' if by_lines else sep)}"
    if style is SeparatorStyle.INSTRUCT:
        words["OPENING"] = f"(ns.system + {words['SEP']} if ns.system else '')"
    # The tokenizer's own, as in training.
    words["EOS"] = f"(eos_token if eos_token is defined and eos_token else {_quoted(template.eos_token)})"
    return words | ({"END": words["EOS"]} if has_own_end and style in WITH_EOS else {})


def _quoted(text) -> str:
    """Return a text as a Jinja literal."""
    return json.dumps(text or "")


def _system(template, is_chat) -> str:
    """Return the lines that read a system message; the line that opens a system text stays."""
    if is_chat:
        return "{%- set ns.conversation = ns.conversation + [{'role': 'system', 'content': ns.text}] -%}"
    opening, newline, _ = template.system.partition("\n")
    head = _quoted(opening + newline if opening.startswith("<|") else "")
    return f"{{%- set ns.system = {head} + ns.text -%}}"


def _wrap(template, use_im_start_end, with_spaces) -> str:
    """Return the line that wraps an image placeholder as in training."""
    placeholder, lines = get_placeholder(template, use_im_start_end), []
    if placeholder != DEFAULT_IMAGE_TOKEN:
        lines.append(f"{{%- set ns.text = ns.text.replace(IMAGE, {_quoted(placeholder)}) -%}}")
    if with_spaces:
        lines.append(_TEXT_WITH_SPACES)
    return "\n".join(lines)
