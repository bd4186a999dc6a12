"""A call owns its state: threads that ask one model at once get what each would get alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import draw_image

from llava_lite.constants import IGNORE_INDEX
from llava_lite.inference import prepare, reply, stream
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
SHORT, LONG = "Hello!", "What colour is the square? How many circles are there in the image? Three blue"
NUM_THREADS = 8


@pytest.fixture
def pair(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: model arguments -> (model whose experts differ, processor)."""

    def make(**options):
        model = toy_model(**options)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if ".experts." in name:
                    param.add_(torch.randn(param.shape, generator=generator) * 0.1)
        processor = load_image_processor(toy_tower_dir("clip"))
        return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, processor)

    return make


@pytest.fixture(autouse=True)
def often_switched():
    """Let threads take turns at nearly every step of Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def inputs_of(processor, *questions):
    """Return the inputs of a batch: of (text, images) pairs."""
    return prepare(processor, [text for text, _ in questions], [images for _, images in questions])[0]


def jobs_of(model, processor):
    """Return functions without arguments, of mixed shapes and ways to call; each returns something to compare."""
    batches = [
        inputs_of(processor, (LONG, draw_image(1)), (SHORT, None)),
        inputs_of(processor, (SHORT, None), (LONG, draw_image(2))),
        inputs_of(processor, (SHORT + LONG, [draw_image(3), draw_image(4)])),
        inputs_of(processor, (SHORT, None), (LONG, None), (LONG + SHORT, None)),
    ]

    def loss(inputs):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)
        with torch.no_grad():
            return model(**inputs, labels=labels.masked_fill(labels < 0, IGNORE_INDEX)).loss.item()

    def tokens(inputs, **more):
        return model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **more).tolist()

    def continue_from(inputs):
        first = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, inputs["input_ids"][:, -3:]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 6, dtype=torch.long)], dim=1)
        return tokens({"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)

    jobs = [lambda batch=batch: loss(batch) for batch in batches]
    jobs += [lambda batch=batch: tokens(batch) for batch in batches]
    jobs += [lambda: tokens(batches[0], num_beams=2), lambda: continue_from(batches[3])]
    jobs += [
        lambda seed=seed: "".join(stream(model, processor, LONG, draw_image(seed), max_new_tokens=6))
        for seed in (1, 2)
    ]
    jobs += [lambda: reply(model, processor, [SHORT, LONG], [draw_image(5), None], max_new_tokens=6)]
    return jobs


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("options", [{}, {"moe": MOE}, {"moe": MOE | {"moe_drop_tokens": True}}], ids=str)
def test_eight_threads_get_what_each_call_gets_alone(pair, options, attention):
    model, processor = pair(**options)
    model.set_attn_implementation(attention)
    jobs = jobs_of(model, processor)
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        together = list(pool.map(lambda job: job(), jobs * 3))
    assert together == alone * 3


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_a_reply_inside_a_loop_over_a_stream_changes_neither(pair, moe):
    model, processor = pair(moe=moe)
    questions = [SHORT, LONG]
    streamed = "".join(stream(model, processor, LONG, draw_image(1), max_new_tokens=12))
    replied = reply(model, processor, questions, max_new_tokens=12)
    pieces = []
    for piece in stream(model, processor, LONG, draw_image(1), max_new_tokens=12):
        pieces.append(piece)
        assert reply(model, processor, questions, max_new_tokens=12) == replied
    assert "".join(pieces) == streamed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_eight_threads_are_those_of_each_call_alone(pair, checkpointing):
    model, processor = pair(moe=MOE)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = [model.moe_layers()[0].gate.weight, model.model.mm_projector[0].weight]
    batches = [
        inputs_of(processor, (SHORT, None), (LONG, draw_image(seed)), (SHORT * seed, draw_image(seed)))
        for seed in range(1, 5)
    ]

    def gradients(inputs):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)
        loss = model(**inputs, labels=labels.masked_fill(labels < 0, IGNORE_INDEX), use_cache=False).loss
        return torch.autograd.grad(loss, weights)

    alone = [gradients(batch) for batch in batches]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        together = list(pool.map(gradients, batches * 4))
    for found, expected in zip(together, alone * 4, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def state_of(model):
    """Return what is kept on the modules beside weights: {(module, attribute): what it is}."""
    return {
        (name, key): (id(value) if not isinstance(value, (bool, int, float, str, tuple)) else value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_no_call_leaves_anything_on_the_model_or_in_its_configs(pair, moe):
    model, processor = pair(moe=moe)
    # What is computed from the config alone is made once.
    assert model.get_vision_tower().image_processor
    before = state_of(model), model.config.to_dict(), model.generation_config.to_dict()
    for job in jobs_of(model, processor):
        job()
    assert (state_of(model), model.config.to_dict(), model.generation_config.to_dict()) == before


def test_a_model_in_training_is_in_evaluation_while_any_call_generates(pair):
    model, processor = pair(moe=MOE)
    jobs = jobs_of(model, processor)[4:]
    alone = [job() for job in jobs]
    model.train()
    model.get_vision_tower().eval()
    modes = [module.training for module in model.modules()]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(lambda job: job(), jobs * 2)) == alone * 2
    assert [module.training for module in model.modules()] == modes
