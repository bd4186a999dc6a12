"""64 clients at once: no request is lost, and each answer is the one that `reply` gives alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from api_server import serving, show
from conftest import WORDS, draw_image

from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

pytest.importorskip("openai", reason="asks with OpenAI's client, of the extra dev")
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
NUM_CLIENTS, NUM_REQUESTS, NUM_KINDS = 64, 500, 125


def kinds():
    """Return (text, images, longest answer) of requests of every length, with none, one or two images."""
    rng = random.Random(0)
    return [
        (
            " ".join(rng.choices(WORDS, k=rng.randint(2, 60))),
            [draw_image(i + j) for j in range(i % 3)],
            rng.randint(1, 40),
        )
        for i in range(NUM_KINDS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_64_clients_get_the_answers_of_reply(toy_model, toy_tokenizer, toy_tower_dir, moe):
    model = toy_model(moe=moe, conv_template="v1")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    processor = load_image_processor(toy_tower_dir("clip"))
    processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, processor)
    asked = kinds()
    expected = [reply(model, processor, text, images, max_new_tokens=longest) for text, images, longest in asked]
    assert len(set(expected)) > 100

    with serving(model, processor, "--max-batch", "64", "--max-queue", "64") as server:

        def ask(number):
            text, images, longest = asked[number % NUM_KINDS]
            fields = {"model": "toy", "messages": show(*images, text=text), "temperature": 0, "max_tokens": longest}
            if number % 2:
                return server.client.chat.completions.create(**fields).choices[0].message.content
            chunks = server.client.chat.completions.create(stream=True, **fields)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            answers = list(clients.map(ask, range(NUM_REQUESTS)))
        sizes = server.app.state.engine.metrics.batch_size
    assert answers == [expected[number % NUM_KINDS] for number in range(NUM_REQUESTS)]
    steps = {sample.name.rpartition("_")[2]: sample.value for metric in sizes.collect() for sample in metric.samples}
    # The clients did share steps.
    assert steps["sum"] / steps["count"] > 4
