"""A chat request is read in full, or refused with the field that is wrong."""

import pytest

from llava_lite.serve.api.chat_request import ChatRequest, ImageURL
from llava_lite.serve.api.errors import RequestError

HELLO = {"model": "toy", "messages": [{"role": "user", "content": "Hello!"}]}
PNG = "data:image/png;base64,aGVsbG8="


def image_part(**more):
    return {"type": "image_url", "image_url": {"url": PNG, **more}}


def test_what_is_left_out_has_the_defaults_of_openai():
    asked = ChatRequest.read(HELLO)
    assert asked.messages == [("user", ["Hello!"])]
    assert (asked.temperature, asked.top_p, asked.n, asked.stream) == (1.0, 1.0, 1, False)
    assert (asked.max_tokens, asked.num_top, asked.stops, asked.include_usage) == (None, None, (), False)
    assert asked.seed != ChatRequest.read(HELLO).seed


def test_every_field_is_read():
    asked = ChatRequest.read(
        HELLO
        | {"max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "n": 3, "stop": ["a", "b"], "seed": 2**63 - 1}
        | {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    )
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.stops) == (7, 0.0, 0.5, ("a", "b"))
    assert (asked.stream, asked.include_usage, asked.num_top) == (True, True, 2)
    assert asked.seeds() == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert ChatRequest.read(HELLO | {"stop": "a", "max_tokens": 4, "max_completion_tokens": 4}).max_tokens == 4


@pytest.mark.parametrize(
    "neutral",
    [
        {"temperature": None, "stop": None, "tools": None},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "store": False, "service_tier": "auto", "user": "me"},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(neutral):
    assert ChatRequest.read(HELLO | neutral).messages == [("user", ["Hello!"])]


def test_images_stand_where_the_message_has_them():
    parts = [{"type": "text", "text": "First"}, image_part(), image_part(detail="auto"), {"type": "text", "text": "?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Red.", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "And now?"},
    ]
    asked = ChatRequest.read(HELLO | {"messages": messages})
    images = [ImageURL(PNG, f"messages[1].content[{i}]") for i in (1, 2)]
    assert asked.messages == [
        ("system", ["Be brief."]),
        ("user", ["First", *images, "?"]),
        ("assistant", ["Red."]),
        ("user", ["And now?"]),
    ]


def with_message(**message):
    return {"messages": [{"role": "user", "content": "Hello!"} | message]}


def with_part(part):
    return with_message(content=[part])


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "expected a list of messages"),
        ({"messages": ["hello"]}, "messages[0]", "expected an object with role and content"),
        ({"temperature": 2.1}, "temperature", "temperature is 2.1; expected a number from 0 to 2"),
        ({"temperature": "0"}, "temperature", 'temperature is "0"'),
        ({"temperature": True}, "temperature", "temperature is true"),
        ({"temperature": float("nan")}, "temperature", "temperature is NaN"),
        ({"top_p": -0.1}, "top_p", "expected a number from 0 to 1"),
        ({"n": 0}, "n", "expected a whole number from 1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "expected a number of tokens, 1 or more"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 texts"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"seed": 1.0}, "seed", "seed is 1.0"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "include_usage"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"top_k": 5}, "top_k", 'Unknown field "top_k"; known: model, messages'),
        ({"presence_penalty": 0.5}, "presence_penalty", "this server would ignore it"),
        ({"presence_penalty": False}, "presence_penalty", "this server would ignore it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        (with_message(role="tool"), "messages[0].role", "known: system, developer, user, assistant"),
        (with_message(role=["user"]), "messages[0].role", "known: system"),
        (with_message(role="assistant"), "messages", "expected 'user'"),
        (with_message(name="Ada"), "messages[0].name", "this server would ignore it"),
        (with_message(content=3), "messages[0].content", "expected a text or a list of parts"),
        (with_message(content=None), "messages[0].content", "expected a text or a list of parts"),
        (with_message(content=[{"type": "text", "text": ""}] * 2049), "messages[0].content", "has 2,049 entries"),
        ({"messages": HELLO["messages"] * 2049}, "messages", "messages has 2,049 entries; expected at most 2,048"),
        (with_message(content=[]), "messages[0].content", "messages[0].content is []; expected a text or a list"),
        (with_message(content=None), "messages[0].content", "messages[0].content is null"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role is missing"),
        ({"model": False}, "model", "model is false; expected the name of a model"),
        ({"model": {"a": None, "b": "\u00e9"}}, "model", 'model is {"a": null, "b": "\u00e9"}'),
        ({"k" * 10**6: 1}, "k" * 60, 'Unknown field "kkk'),
        (with_message(content="a <image> b"), "messages[0].content", "the model's placeholder"),
        (with_part("Hello!"), "messages[0].content[0]", 'expected {"type": "text"'),
        (with_part({"type": "input_audio"}), "messages[0].content[0]", 'expected {"type": "text"'),
        (with_part({"type": "text", "text": "a", "x": 1}), "messages[0].content[0]", "expected"),
        (with_part({"type": "image_url", "image_url": PNG}), "messages[0].content[0]", "expected"),
        (with_part(image_part(detail="high")), "messages[0].content[0]", '"detail": "high"'),
        ({"messages": [{"role": "system", "content": [image_part()]}]}, "messages[0].content[0]", "only users show"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_what_would_be_ignored_or_is_wrong_is_refused(change, param, message):
    with pytest.raises(RequestError) as refused:
        ChatRequest.read(HELLO | change)
    assert message in str(refused.value)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert len(str(refused.value)) < 500
    assert refused.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="no JSON object"):
        ChatRequest.read(body)
