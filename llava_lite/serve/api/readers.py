"""Read the images of requests and write their prompts, in threads.

What is cheap never waits for what is expensive: downloads, images, short texts and long ones have threads of their
own.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from llava_lite.serve.api.answer import Answer
from llava_lite.serve.api.chat_request import ChatRequest, ImageURL
from llava_lite.serve.api.images import decode_image, is_data_url, read_bytes
from llava_lite.serve.api.prompts import Prompts

NUM_FETCHERS, NUM_DECODERS, NUM_WRITERS = 32, 4, 4
# Images of one request that are fetched at one time.
MAX_FETCHES = 4
# The size of a request from which on its prompt is long: about 0.1 s. A message is worth some characters.
LONG, SIZE_OF_PART = 2**14, 64


class Readers:
    """Threads that turn requests into answers that an engine can generate."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, "fetcher")
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, "decoder")
        self._writers = ThreadPoolExecutor(NUM_WRITERS, "writer")
        # One: they are in Python for most of the time, and more would only slow the others down.
        self._long_writers = ThreadPoolExecutor(1, "long-writer")

    def close(self) -> None:
        """Begin nothing more."""
        for threads in (self._fetchers, self._decoders, self._writers, self._long_writers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def answers(self, asked: ChatRequest, sends: list) -> list[Answer]:
        """Return the answers of a request; RequestError as of Prompts, before any image is fetched if possible."""
        self.prompts.check_images(asked)
        images = asked.images()
        is_long = size_of(asked) > LONG
        if is_long:
            await run(self._long_writers, self.prompts.check_len, asked)
        opened = await self._images(images)
        threads = self._long_writers if is_long else self._decoders if images else self._writers
        return await run(threads, self.prompts.answers, asked, opened, sends)

    async def _images(self, images: list[ImageURL]) -> list:
        """Return images in order; those of one request are read at one time, within MAX_FETCHES."""
        gate = asyncio.Semaphore(MAX_FETCHES)
        tasks = [asyncio.ensure_future(self._image(image, gate)) for image in images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # Where one fails, the others are not begun.
            for task in tasks:
                task.cancel()

    async def _image(self, image: ImageURL, gate: asyncio.Semaphore):
        limits = self.prompts.limits
        async with gate:
            loaders = self._decoders if is_data_url(image.url) else self._fetchers
            data = await run(loaders, read_bytes, image, limits)
            return await run(self._decoders, decode_image, image, data, limits)


def size_of(asked: ChatRequest) -> int:
    """Return by what the time of writing a prompt grows, in characters."""
    return sum(len(text) + SIZE_OF_PART for text in asked.texts()) + SIZE_OF_PART * len(asked.messages)


async def run(threads: ThreadPoolExecutor, function, *args):
    """Return what a function returns in one of some threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)
