"""What is cheap never waits for what is expensive: texts for downloads, short texts for long ones."""

import asyncio
import io
import threading
from contextlib import contextmanager

import pytest
from api_server import show
from conftest import draw_image

from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.api import images as images_module
from llava_lite.serve.api import readers as module
from llava_lite.serve.api.chat_request import ChatRequest
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits
from llava_lite.serve.api.prompts import Prompts
from llava_lite.serve.api.readers import Readers

LIMITS = ImageLimits(max_images=8, hosts=frozenset({"img.example.org"}))


@pytest.fixture
def reading(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a context that yields Readers of a toy."""
    model = toy_model(conv_template="v1")
    processor = LlavaLiteProcessor.from_config(
        model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
    )

    @contextmanager
    def reading():
        readers = Readers(Prompts(model, processor, LIMITS))
        try:
            yield readers
        finally:
            readers.close()

    return reading


def ask(messages):
    return ChatRequest.read({"model": "toy", "messages": messages})


def ask_of_addresses(count):
    urls = [{"type": "image_url", "image_url": {"url": f"http://img.example.org/{i}.png"}} for i in range(count)]
    return ask([{"role": "user", "content": [*urls, {"type": "text", "text": "?"}]}])


def write(readers, asked):
    return asyncio.ensure_future(readers.answers(asked, [None]))


class SlowHost:
    """Answers to `fetch` with an image, once `go_on` is set; counts those who wait."""

    def __init__(self, monkeypatch):
        self.go_on, self.lock, self.num_waiting, self.most = threading.Event(), threading.Lock(), 0, 0
        monkeypatch.setattr(images_module, "fetch", self.fetch)

    def fetch(self, url, *limits):
        with self.lock:
            self.num_waiting += 1
            self.most = max(self.most, self.num_waiting)
        assert self.go_on.wait(60)
        with self.lock:
            self.num_waiting -= 1
        file = io.BytesIO()
        draw_image(int(url[-5])).save(file, "PNG")
        return file.getvalue()

    async def until_waiting(self, count):
        while self.num_waiting < count:
            await asyncio.sleep(0.01)


def test_texts_and_sent_images_do_not_wait_for_downloads(reading, monkeypatch):
    host = SlowHost(monkeypatch)

    async def run(readers):
        slow = [write(readers, ask_of_addresses(4)) for _ in range(module.NUM_FETCHERS // 4 + 3)]
        await host.until_waiting(module.NUM_FETCHERS)
        for asked in (ask(show()), ask(show(draw_image(1)))):
            (answer,) = await asyncio.wait_for(readers.answers(asked, [None]), 60)
            assert answer.prompt_len > 10
        assert not any(task.done() for task in slow)
        host.go_on.set()
        assert all(await asyncio.gather(*slow))

    with reading() as readers:
        asyncio.run(run(readers))


def test_images_of_a_request_are_fetched_at_one_time_within_bounds_and_stay_in_order(reading, monkeypatch):
    host = SlowHost(monkeypatch)

    async def run(readers):
        task = write(readers, ask_of_addresses(8))
        await host.until_waiting(module.MAX_FETCHES)
        host.go_on.set()
        (fetched,) = await task
        (sent,) = await write(readers, ask(show(*[draw_image(i) for i in range(8)], text="?")))
        assert fetched.inputs["pixel_values"].equal(sent.inputs["pixel_values"])

    with reading() as readers:
        asyncio.run(run(readers))
    assert host.most == module.MAX_FETCHES


@pytest.mark.parametrize("name", ["check_len", "answers"])
def test_a_long_text_does_not_hold_up_short_ones(reading, monkeypatch, name):
    go_on, done = threading.Event(), getattr(Prompts, name)

    def slow(prompts, asked, *rest):
        assert module.size_of(asked) < module.LONG or go_on.wait(60)
        return done(prompts, asked, *rest)

    monkeypatch.setattr(Prompts, name, slow)

    async def run(readers):
        long = [write(readers, ask(show(text="red " * 5000))) for _ in range(5)]
        many = write(
            readers,
            ask([{"role": role, "content": "a"} for role in ("user", "assistant")] * 1000 + show()),
        )
        # All that can come to the slow step are there.
        await asyncio.sleep(1)
        await asyncio.wait_for(readers.answers(ask(show()), [None]), 60)
        await asyncio.wait_for(readers.answers(ask(show(draw_image(1))), [None]), 60)
        assert not any(task.done() for task in [*long, many])
        go_on.set()
        for task in [*long, many]:
            with pytest.raises(RequestError, match="This model's context is"):
                await task

    with reading() as readers:
        asyncio.run(run(readers))


@pytest.mark.parametrize(
    "text", ["red " * 100_000, "\u6c49" * 50_000, "\U0001f600" * 40_000], ids=["a", "zh", "emoji"]
)
def test_a_text_far_beyond_the_context_is_not_tokenized_and_no_image_is_fetched(reading, monkeypatch, text):
    host = SlowHost(monkeypatch)

    async def run(readers):
        monkeypatch.setattr(readers.prompts.processor, "_encode", None)
        asked = ask_of_addresses(2)
        asked.messages[0][1].append(text)
        with pytest.raises(
            RequestError, match=r"context is 2,048 tokens; the messages have at least [\d,]+ and"
        ) as it:
            await readers.answers(asked, [None])
        assert (it.value.status, it.value.code) == (400, "context_length_exceeded")

    with reading() as readers:
        asyncio.run(run(readers))
    assert host.most == 0


def test_a_text_that_the_format_drops_does_not_count(reading):
    async def run(readers):
        readers.prompts.processor.conv_template = "plain"
        (answer,) = await readers.answers(ask(show(draw_image(1), text="red " * 100_000)), [None])
        assert answer.prompt_len < 50

    with reading() as readers:
        asyncio.run(run(readers))
