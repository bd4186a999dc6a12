"""Turn messages into the prompt of a tokenizer's own chat template, and find the answers in it."""


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

    def write(said, is_open=False):
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
