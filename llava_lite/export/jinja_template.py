"""Turn a prompt format into the Jinja chat template that writes the same prompts.

With it, readers that know messages and no formats of ours (transformers' own processors, vLLM, SGLang) ask a model as
it was trained. A part of a message that is no text is a picture; all else is as in `place_images` and `render`.
"""

import json
import re

from llava_lite.chat_template import takes_images
from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_lite.conversation import SeparatorStyle, get_template

# Puts all messages into ns.talk with text for content, and the words of a system message into ns.system.
_READ = """\
{%- set ns = namespace(talk=[], said='', system=SYSTEM, prompt='', first=true) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set ns.said = message['content'] -%}
{%- else -%}
{%- set ns.said = '' -%}
{%- for part in message['content'] -%}
{%- set words = part['text'] if part['type'] == 'text' else MARK -%}
{%- set ns.said = ns.said + ('' if loop.first else '\\n') + words -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
READ_SYSTEM
{%- else -%}
{%- if ns.said.count(MARK) == 1 -%}
{%- set ns.said = (MARK + '\\n' + ns.said.replace(MARK, '').strip()).strip() -%}
{%- endif -%}
WRAP
{%- set ns.talk = ns.talk + [{'role': message['role'], 'content': ns.said}] -%}
{%- endif -%}
{%- endfor -%}
"""
# Where `_READ` keeps a message, and what closes an answer before it.
_KEPT = "{%- set ns.talk = ns.talk + [{'role': message['role'], 'content': ns.said}] -%}"
_CLOSED = """\
{%- if message['role'] == 'assistant' -%}
{%- set ns.said = ns.said + MARK -%}
{%- endif -%}
"""
_SPOKEN = """\
{%- set ns.prompt = ns.system + SEP -%}
{%- for message in ns.talk -%}
{%- if message['role'] == 'user' -%}
{%- set ns.prompt = ns.prompt + USER + BLANK + message['content'] + SEP -%}
{%- else -%}
{%- set ns.prompt = ns.prompt + ASSISTANT + BLANK + message['content'] + END -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- set ns.prompt = ns.prompt + ASSISTANT -%}
{%- endif -%}
"""
_INSTRUCTED = """\
{%- for message in ns.talk -%}
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
{%- for message in ns.talk -%}
{%- if message['role'] == 'user' -%}
{%- set ns.prompt = ns.prompt + MARK * message['content'].count(MARK) -%}
{%- else -%}
{%- set ns.prompt = ns.prompt + message['content'] + SEP -%}
{%- endif -%}
{%- endfor -%}
"""
_WRITE = "{{- ns.prompt -}}"
_WRITE_WITH_BLANKS = """\
{%- for part in ns.prompt.split(MARK) -%}
{{- ('' if loop.first else MARK) + ('' if loop.first or not part or part[0] == ' ' else ' ') + part -}}
{%- endfor -%}
"""
_SAID_WITH_BLANKS = """\
{%- set parts = ns.said.split(MARK) -%}
{%- set ns.said = parts[0] -%}
{%- for part in parts[1:] -%}
{%- set ns.said = ns.said + MARK + ('' if not part or part[0] == ' ' else ' ') + part -%}
{%- endfor -%}"""
_STYLES = {
    SeparatorStyle.SINGLE: _SPOKEN,
    SeparatorStyle.TWO: _SPOKEN,
    SeparatorStyle.MPT: _SPOKEN,
    SeparatorStyle.LLAMA_2: _INSTRUCTED,
    SeparatorStyle.PLAIN: _CAPTIONED,
}


def write_jinja(conv_template, use_im_start_end=False, own=None, blank_after_picture=False, end_mark=None) -> str:
    """Return the Jinja text of a format of `conv_templates`.

    own: the tokenizer's chat template (`own_template`), which the format `chat` hands the messages on to, with
    end_mark behind each answer where it writes none. blank_after_picture: write a blank behind every `<image>` that
    has none. A tokenizer that puts a blank before a text's first word only (Llama's,
    legacy=False) reads the text behind a picture as LLaVA does, a text of its own, only if the blank is written.
    """
    template = get_template(conv_template)
    is_chat = template.sep_style is SeparatorStyle.CHAT
    if is_chat and own is None:
        raise ValueError("the format 'chat' is the tokenizer's own chat template, and this tokenizer has none.")
    if is_chat and takes_images(own) and not blank_after_picture:
        return own
    body = "" if is_chat else _STYLES[template.sep_style]
    if is_chat:
        # Its own template starts from messages; blanks are put into their texts.
        write = "{%- set messages = ns.talk -%}\n" + own
    else:
        write = _WRITE_WITH_BLANKS if blank_after_picture else _WRITE
    text = _READ.replace("READ_SYSTEM", _system(template, is_chat))
    text = text.replace("WRAP", _wrap(template, use_im_start_end, blank_after_picture and is_chat))
    # In one pass, since a system text may hold one of the names.
    words = _words(template)
    names = re.compile(rf"\b({'|'.join(words)})\b")
    text, body = (names.sub(lambda match: words[match[0]], part) for part in (text, body))
    if is_chat and end_mark is not None:
        # Behind what was read of a message; only now, since a mark may hold one of the names.
        text = text.replace(_KEPT, _CLOSED.replace("MARK", _quoted(end_mark)) + _KEPT)
    return text + body + (write if is_chat else names.sub(lambda match: words[match[0]], write))


def _words(template) -> dict[str, str]:
    """Return what the capital names stand for, as Jinja literals."""
    has_colon = template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
    ends = {SeparatorStyle.TWO: template.sep2, SeparatorStyle.LLAMA_2: template.sep2}
    user, assistant = (role + (":" if has_colon else "") for role in template.roles)
    words = {
        "SYSTEM": template.system,
        "MARK": DEFAULT_IMAGE_TOKEN,
        "USER": user,
        "ASSISTANT": assistant,
        "BLANK": " " if has_colon else "",
        "SEP": template.sep,
        "END": ends.get(template.sep_style, template.sep),
    }
    return {name: _quoted(text) for name, text in words.items()}


def _quoted(text) -> str:
    """Return a text as a Jinja literal."""
    return json.dumps(text or "")


def _system(template, is_chat) -> str:
    """Return the lines that read a system message; the line that opens a system text stays."""
    if is_chat:
        return "{%- set ns.talk = ns.talk + [{'role': 'system', 'content': ns.said}] -%}"
    opening, newline, _ = template.system.partition("\n")
    head = _quoted(opening + newline if opening.startswith("<|") else "")
    return f"{{%- set ns.system = {head} + ns.said -%}}"


def _wrap(template, use_im_start_end, with_blanks) -> str:
    """Return the line that puts the marks around a picture which the format was trained with."""
    mark = DEFAULT_IMAGE_TOKEN
    if use_im_start_end:
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    if "mmtag" in template.version:
        mark = f"<Image>{mark}</Image>"
    lines = []
    if mark != DEFAULT_IMAGE_TOKEN:
        lines.append(f"{{%- set ns.said = ns.said.replace(MARK, {_quoted(mark)}) -%}}")
    if with_blanks:
        lines.append(_SAID_WITH_BLANKS)
    return "\n".join(lines)
