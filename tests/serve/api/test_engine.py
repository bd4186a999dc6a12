"""One thread answers for many: places in its queue, its end, and models that cannot share a batch."""

import queue

import pytest
from conftest import draw_image

from llava_lite.inference import prepare, reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.api.answer import Answer, Ends
from llava_lite.serve.api.engine import Engine, QueueFull
from llava_lite.serve.api.metrics import Metrics
from llava_lite.serve.api.sampling import Sampling

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
PROMPTS = {"mm_injection": "adaption_prompt", "adaption_prompt_len": 10, "adaption_prompt_layers": 2}


@pytest.fixture
def started(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model, max_batch, max_waiting -> (engine, a function that asks it)."""
    engines = []

    def make(max_batch=4, max_waiting=8, **options):
        model = toy_model(**{"conv_template": "v1"} | options)
        processor = load_image_processor(toy_tower_dir("clip"))
        processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, processor)
        engine = Engine(model, processor, Metrics(), max_batch, max_waiting).start()
        engines.append(engine)

        def ask(text="Hello!", image=None, max_new_tokens=8):
            events = queue.Queue()
            inputs, _ = prepare(processor, [text], [image])
            more = {"ends": Ends.of(model, processor), "decode": processor.decode, "send": events.put}
            answer = Answer(dict(inputs), Sampling(0, 1, 0), max_new_tokens=max_new_tokens, **more)
            engine.reserve(1)
            engine.submit([answer])
            return answer, events

        return engine, ask

    yield make
    for engine in engines:
        engine.close()
        assert not engine.is_alive


def end_of(events):
    """Return the last event of an answer."""
    while (event := events.get(timeout=60))[0] == "piece":
        pass
    return event


def test_places_are_reserved_used_and_given_back(started):
    engine, ask = started(max_waiting=3)
    engine.reserve(2)
    with pytest.raises(QueueFull, match="2 of the 3 places in the queue are taken; there is none for 2 more"):
        engine.reserve(2)
    assert engine.num_waiting == 2
    engine.release(2)
    _, events = ask()
    assert end_of(events)[0] == "end"
    assert engine.num_waiting == 0
    engine.reserve(3)
    engine.release(3)


@pytest.mark.parametrize(
    "options",
    [
        {"moe": {**MOE, "moe_drop_tokens": True, "eval_capacity_factor": 0.5}},
        {**PROMPTS, "mm_projector_type": "query_vit"},
    ],
    ids=["capacity", "prompts"],
)
def test_a_model_whose_answers_depend_on_a_batch_answers_one_after_another(started, options):
    engine, ask = started(**options)
    assert engine.why_alone is not None
    asked = [(f"What colour is the square {i}?", draw_image(i) if i % 2 else None) for i in range(5)]
    events = [ask(*one)[1] for one in asked]
    expected = [reply(engine.model, engine.processor, *one, max_new_tokens=8) for one in asked]
    assert [end_of(seen)[1] for seen in events] == expected


def test_an_engine_that_is_closed_tells_those_who_wait(started):
    engine, ask = started(max_batch=1)
    engine.model.generation_config.suppress_tokens = [engine.processor.tokenizer.eos_token_id]
    events = [ask(max_new_tokens=1900)[1] for _ in range(2)]
    assert events[0].get(timeout=60)[0] == "piece"
    engine.close()
    for seen in events:
        kind, error = end_of(seen)
        assert (kind, str(error)) == ("error", "the server is stopping.")
    assert not engine.is_alive


def test_an_answer_that_is_given_up_in_the_queue_is_never_read(started):
    engine, ask = started(max_batch=1)
    engine.model.generation_config.suppress_tokens = [engine.processor.tokenizer.eos_token_id]
    running, events = ask(max_new_tokens=1900)
    assert events.get(timeout=60)[0] == "piece"
    waiting, _ = ask(image=draw_image(1))
    assert engine.num_waiting == 1
    engine.leave([waiting])
    assert engine.num_waiting == 0
    engine.leave([running])
    _, last = ask()
    assert end_of(last)[0] == "end"
    assert waiting.tokens == []
