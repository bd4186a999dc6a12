"""Bodies are received within bounds, and read as JSON; clients that send half of one keep nobody out."""

import asyncio
import json

import pytest

from llava_lite.serve.api import body as module
from llava_lite.serve.api.body import MAX_TEXT_BYTES, Bodies, read_json
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits

LIMITS = ImageLimits(max_images=2, max_bytes=1000)


class Upload:
    """A request whose body comes in pieces; `more` lets it go on after them."""

    def __init__(self, *pieces, is_complete=True, **headers):
        self.pieces, self.headers = pieces, headers
        self.more = asyncio.Event()
        if is_complete:
            self.more.set()

    async def stream(self):
        for piece in self.pieces:
            yield piece
        await self.more.wait()


async def outcome(task):
    """Return what a task returned, or the status and the message of its error."""
    try:
        return bytes(await task)
    except RequestError as error:
        return error.status, str(error)


def test_a_body_is_what_was_sent_and_has_a_limit():
    async def run():
        bodies = Bodies(LIMITS, timeout_s=60)
        assert await outcome(bodies.receive(Upload(b"ab", b"c"))) == b"abc"
        too_long = Upload(b"x" * bodies.longest, b"y")
        declared = Upload(is_complete=False, **{"content-length": str(bodies.longest + 1)})
        for request in (too_long, declared):
            assert await outcome(bodies.receive(request)) == (413, f"The body has more than {bodies.longest:,} bytes.")

    asyncio.run(run())


def test_a_body_that_is_never_complete_is_given_up():
    async def run():
        bodies = Bodies(LIMITS, timeout_s=0.2)
        found = await outcome(bodies.receive(Upload(b"ab", is_complete=False)))
        assert found == (408, "The body was not complete after 0.2 s.")
        assert Bodies(LIMITS, timeout_s=300).timeout_s == module.RECEIVE_S

    asyncio.run(run())


@pytest.mark.parametrize("reason", ["number", "bytes"])
def test_of_too_many_incomplete_bodies_the_first_makes_room(reason):
    async def run():
        bodies = Bodies(LIMITS, timeout_s=60, max_bodies=3 if reason == "number" else 100)
        part = b"x" if reason == "number" else b"x" * (bodies.longest - 1)
        allowed = 3 if reason == "number" else module.MAX_LONGEST
        halves = [Upload(part, is_complete=False) for _ in range(allowed + 2)]
        tasks = [asyncio.ensure_future(outcome(bodies.receive(half))) for half in halves]
        await asyncio.sleep(0.1)
        assert [task.done() for task in tasks] == [True] * 2 + [False] * allowed
        assert await tasks[0] == (408, "Too many bodies are incomplete, and this one began first. Send it again.")
        assert await outcome(bodies.receive(Upload(b"abc"))) == b"abc"
        for half in halves:
            half.more.set()
        assert [len(await task) for task in tasks[3:]] == [len(part)] * (allowed - 1)

    asyncio.run(run())


def as_body(value):
    return bytearray(json.dumps(value).encode())


def test_text_is_counted_apart_from_images():
    long = "x" * MAX_TEXT_BYTES
    for start in ("data:", "DATA:"):
        assert read_json(as_body({"url": start + long})) == {"url": start + long}
    # Texts that only look like images cost as objects more than as bytes.
    for value in (long, [f"data:{'x' * 100}"] * 10_000, [[]] * 500_000):
        with pytest.raises(RequestError, match=r"bytes beside its images; .* at most 1,048,576") as error:
            read_json(as_body(value))
        assert error.value.status == 413


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is no JSON (Expecting value: line 1 column 1 (char 0))."),
        (b'{"a": 1', "The body is no JSON ("),
        (b"[" * 100_000, "The body is nested too deeply."),
        (b'["\xff"]', "The body is no JSON (it is not UTF-8)."),
        (b'{"seed": ' + b"9" * 5000 + b"}", "The body has a number of 5,000 digits"),
    ],
    ids=["empty", "cut", "nested", "latin-1", "digits"],
)
def test_what_is_no_json_is_refused_in_its_own_words(body, message):
    with pytest.raises(RequestError) as refused:
        read_json(bytearray(body))
    assert str(refused.value).startswith(message)
    assert "sys." not in str(refused.value)
