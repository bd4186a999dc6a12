"""Messages in any order of roles, written as inference servers write them from the Jinja text of a format."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.conversation import conv_templates, get_template
from llava_lite.conversation.images import place_images
from llava_lite.conversation.messages import read_conversations
from llava_lite.conversation.prompts import check_roles, names_in, regular_turns, write_roles
from llava_lite.export.jinja import write_jinja

FORMATS = sorted(set(conv_templates) - {"chat"})
ORDERS = {
    "in turns": "uau",
    "answered": "ua",
    "two of the user": "uu",
    "three of the user": "uuua",
    "two of the assistant": "uaau",
    "system": "su",
    "system and two": "suua",
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def conversation_of(order, image_at=None):
    messages = [{"role": ROLES[letter], "content": f" text{i} "} for i, letter in enumerate(order)]
    if image_at is not None:
        messages[image_at]["content"] = [{"type": "text", "text": "Look"}, {"type": "image"}]
    return messages, read_conversations(messages)[0][0]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FORMATS)
def test_any_order_is_written_as_the_formats_own_jinja_text_writes_it(name, order, is_open):
    order = ORDERS[order]
    messages, conversation = conversation_of(order, image_at=order.index("u"))
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=write_jinja(name), add_generation_prompt=is_open
    )
    assert write_roles(conversation, name, is_open=is_open).text == expected


@pytest.mark.parametrize("name", FORMATS)
def test_turns_are_written_as_in_training(name):
    _, conversation = conversation_of("uau", image_at=0)
    turns, system = regular_turns(conversation)
    template = get_template(name)
    spoken = [turn for question, answer in turns for turn in (("human", question), ("gpt", answer))]
    expected = template.with_turns(place_images(spoken, template), system).render()
    assert write_roles(conversation, name, is_open=True).text == expected.text


@pytest.mark.parametrize(
    ("messages", "output"),
    [
        ([("user", "a"), ("tool", "b")], "the template 'v1' cannot write the role 'tool'; got user, tool"),
        ([("user", "a"), ("system", "b")], "one system text, before all messages; got user, system"),
        ([("system", "a"), ("system", "b"), ("user", "c")], "one system text, before all messages"),
        ([("system", "a")], "at least one user message; got system"),
        ([("assistant", "a"), ("user", "b")], "messages must be in the order .*; got assistant, user"),
    ],
)
def test_what_a_named_format_would_lose_is_refused(messages, output):
    conversation = read_conversations([{"role": role, "content": text} for role, text in messages])[0][0]
    with pytest.raises(ValueError, match=output):
        check_roles(conversation, "v1")


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "tool_call_id"])
def test_a_key_that_a_named_format_would_lose_is_refused(key):
    conversation = read_conversations([{"role": "user", "content": "a", key: "x", "name": "Ann"}])[0][0]
    with pytest.raises(ValueError, match=f"'v1' cannot write '{key}' of a message"):
        check_roles(conversation, "v1")


@pytest.mark.parametrize(
    ("template", "known", "unknown"),
    [
        ("{{ a }} b {# c #}", "a", "bc"),
        ("{% if a is defined and 'b' in x %}{{ c['d'] }}{% endif %}", "axc", "bd"),
        ('{%- set a = "b" -%}{{ d | e }} c', "ade", "bc"),
        ("plain text", "", "plain"),
    ],
)
def test_names_of_a_jinja_text_are_those_that_it_uses(template, known, unknown):
    names = names_in(template)
    assert set(known) <= names
    assert not set(unknown) & names
