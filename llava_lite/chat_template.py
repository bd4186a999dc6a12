"""Turn messages into the prompt of a tokenizer's own chat template, and find the answers in it."""

from functools import lru_cache

from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.constants import DEFAULT_IMAGE_TOKEN

# Special tokens that a template may name.
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")


def write_chat(system, messages, tokenizer) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the prompt and the character spans of the answers, each with its end mark.

    system: text, or "" for what the template says itself. messages: (role, text), the user first; a last text of None
    is the turn to be generated. A span starts where the template's own generation prompt ends.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        found = "no tokenizer" if tokenizer is None else f"{tokenizer.name_or_path!r} without one"
        raise ValueError(
            f"the template 'chat' needs a tokenizer with a chat template; got {found}. "
            "Choose another template (--version, --conv-mode) or set tokenizer.chat_template."
        )

    in_parts = takes_parts(tokenizer.get_chat_template())

    def write(said, is_open=False):
        if in_parts:
            said = [{**turn, "content": parts_of(turn["content"])} for turn in said]
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=is_open)

    head = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, (_, text) in enumerate(messages) if text is not None]
    text = write(head + said, is_open=bool(messages) and messages[-1][1] is None)
    end_mark = _end_mark(write)
    spans = []
    for i in range(1, len(said), 2):
        start = _num_shared(write(head + said[:i], is_open=True), text)
        end = _end_of_answer(text, start, said[i]["content"].strip(), end_mark)
        if start < len(write(head + said[:i])) or end is None:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} writes turn {i + 1} anew when more follows, "
                "so its answer cannot be found in the prompt. Train with one of the named templates instead."
            )
        spans.append((start, end))
    return text, tuple(spans)


@lru_cache(maxsize=16)
def takes_parts(template) -> bool:
    """Tell whether a chat template reads messages in parts, as those of models that see do, and not texts alone."""
    probe = "question0"
    talk = [{"role": "user", "content": [{"type": "text", "text": probe}]}]
    try:
        written = render_jinja_template(conversations=[talk], chat_template=template, **_TOKENS)[0][0]
    # A template may do anything with a list where it expects a text.
    except Exception:
        return False
    # One that prints the list as it stands has not read it.
    return probe in written and "'text'" not in written


def parts_of(text) -> list[dict]:
    """Return a text as a message's parts: one for every mark of a picture, without the line break that follows it."""
    first, *behind = text.split(DEFAULT_IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first else []
    for words in behind:
        words = words.removeprefix("\n")
        parts += [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
    return parts


def _end_mark(write) -> str:
    """Return what the template puts behind an answer, without the blanks that only part it from the next turn."""
    probe = "answer0"
    written = write([{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}])
    mark = written[written.rindex(probe) + len(probe) :]
    return mark.rstrip() or mark


def _num_shared(one, other) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _end_of_answer(text, start, answer, end_mark) -> int | None:
    said_at = text.find(answer, start)
    end_at = text.find(end_mark, said_at + len(answer)) if said_at >= 0 else -1
    return end_at + len(end_mark) if end_at >= 0 else None
