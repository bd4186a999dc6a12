"""Whoever else is asked, an answer is the one that `reply` gives alone."""

import pytest
import torch
from conftest import BACKBONE_TYPES, WORDS, draw_image

from llava_lite.inference import prepare, reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.api import sampling as sampling_module
from llava_lite.serve.api.answer import Answer, Ends
from llava_lite.serve.api.batch import Batch, join_caches, pad_left, tensors_of, why_alone
from llava_lite.serve.api.sampling import Sampling

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
QUESTIONS = [" ".join(WORDS[i : i + 3 + 5 * (i % 4)]) for i in range(7)]
IMAGES = [draw_image(i) if i % 3 else None for i in range(7)]
LENGTHS = [2 + 3 * (i % 4) for i in range(7)]


@pytest.fixture
def pair(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model -> (model whose experts differ, processor)."""

    def make(model_type="llama", **options):
        model = toy_model(model_type, **({"conv_template": "v1"} | options))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".experts." in name:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        image_processor = load_image_processor(toy_tower_dir("clip"))
        return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, image_processor)

    return make


def ask(pair, i, temperature=0.0, top_p=1.0, **more):
    """Return (answer to question i, list of its events)."""
    model, processor = pair
    inputs, _ = prepare(processor, [QUESTIONS[i]], [IMAGES[i]])
    events = []
    more = {"max_new_tokens": LENGTHS[i]} | more
    sampling = Sampling(temperature, top_p, seed=i)
    return Answer(dict(inputs), sampling, Ends.of(model, processor), processor.decode, events.append, **more), events


def text_of(events):
    """Return the text of an answer, which its pieces add up to."""
    assert events[-1][0] == "end"
    assert "".join(values[0] for kind, *values in events if kind == "piece") == events[-1][1]
    return events[-1][1]


def run(pair, max_batch, **more):
    """Return (texts of all questions, sizes of the batch step by step, number of answers that were asked again)."""
    batch = Batch(pair[0], pair[1].pad_token_id)
    waiting, sizes, again = [ask(pair, i, **more) for i in range(len(QUESTIONS))], [], 0
    events = [seen for _, seen in waiting]
    while waiting or batch.answers:
        if waiting and len(batch.answers) < max_batch:
            batch.read(waiting.pop(0)[0])
        if batch.answers:
            # One step at a time as long as others wait: they join in the middle of the others' answers.
            batch.run(lambda: not waiting, sizes.append)
        while batch.doubtful:
            batch.run_alone(batch.doubtful.pop())
            again += 1
    return [text_of(seen) for seen in events], sizes, again


def replies(pair):
    """Return what `reply` answers to each question alone."""
    asked = zip(QUESTIONS, IMAGES, LENGTHS, strict=True)
    return [reply(*pair, text, image, max_new_tokens=length) for text, image, length in asked]


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_answers_that_join_and_leave_a_batch_are_those_of_reply(pair, model_type, moe):
    asked = pair(model_type, moe=moe)
    assert why_alone(asked[0]) is None
    texts, sizes, _ = run(asked, max_batch=4)
    assert texts == replies(asked)
    assert len(set(texts)) > 4
    assert set(sizes) == {1, 2, 3, 4}


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_answers_that_rounding_might_change_are_generated_again(pair, moe, monkeypatch):
    asked = pair(moe=moe)
    # So large an error that most tokens count as doubtful.
    monkeypatch.setattr(sampling_module, "ROUNDINGS", 500_000)
    texts, _, again = run(asked, max_batch=4)
    assert again > 3
    assert texts == replies(asked)


def test_a_batch_that_is_not_exact_generates_nothing_again(pair, monkeypatch):
    asked = pair()
    monkeypatch.setattr(sampling_module, "ROUNDINGS", 500_000)
    batch = Batch(asked[0], asked[1].pad_token_id, is_exact=False)
    answers = [ask(asked, i)[0] for i in (1, 2)]
    for answer in answers:
        batch.read(answer)
    batch.run(lambda: True, lambda count: None)
    assert batch.doubtful == []


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_seed_draws_the_same_answer_alone_and_in_a_batch(pair, moe, top_p):
    asked = pair(moe=moe)
    together, sizes, _ = run(asked, max_batch=4, temperature=1.0, top_p=top_p)
    alone, ones, _ = run(asked, max_batch=1, temperature=1.0, top_p=top_p)
    assert (max(sizes), max(ones)) == (4, 1)
    assert together == alone != replies(asked)


def test_a_penalty_of_the_checkpoint_counts_no_padding(pair):
    asked = pair()
    plain = replies(asked)
    asked[0].generation_config.repetition_penalty = 1.7
    texts, *_ = run(asked, max_batch=4)
    assert texts == replies(asked) != plain


def test_a_stop_of_the_checkpoint_ends_an_answer_as_in_reply(pair):
    asked = pair()
    plain = replies(asked)
    asked[0].generation_config.stop_strings = ["e", "n"]
    texts, *_ = run(asked, max_batch=4)
    assert texts == replies(asked) != plain


def test_a_placeholder_of_the_vocabulary_is_not_taken_for_a_new_image(pair):
    asked = pair(image_token_index=5)
    assert run(asked, max_batch=4)[0] == replies(asked)


def test_a_client_that_leaves_frees_its_place_at_the_next_step(pair):
    asked = pair()
    batch = Batch(asked[0], asked[1].pad_token_id)
    (first, first_events), (second, second_events) = (ask(asked, i, max_new_tokens=30) for i in (1, 2))
    batch.read(first)
    batch.read(second)
    sizes = []

    def leave(count):
        sizes.append(count)
        second.is_left = len(sizes) == 3

    assert batch.run(lambda: True, leave) == [second]
    assert (sizes, batch.answers) == ([2, 2, 2], [first])
    while batch.answers:
        batch.run(lambda: True, sizes.append)
    assert set(sizes[3:]) == {1}
    assert text_of(first_events) == reply(*asked, QUESTIONS[1], IMAGES[1], max_new_tokens=30)
    assert not any(kind == "end" for kind, *_ in second_events)


def test_log_probabilities_are_those_of_the_model(pair):
    model, processor = pair()
    answer, events = ask((model, processor), 1, num_top=2)
    batch = Batch(model, processor.pad_token_id)
    batch.read(answer)
    (_, _, (entry,)), *_ = events
    expected = model(**answer.inputs).logits[0, -1].log_softmax(-1).topk(2).values
    assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(expected.tolist())
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"moe": {**MOE, "moe_drop_tokens": True}}, "moe_drop_tokens"),
        ({"moe": {**MOE, "moe_second_expert_sampling": "always"}}, "drawn at random"),
        (
            {"mm_injection": "adaption_prompt", "adaption_prompt_len": 10, "adaption_prompt_layers": 2},
            "adaption_prompt",
        ),
    ],
    ids=["capacity", "sampled experts", "prompts"],
)
def test_models_whose_answers_depend_on_a_batch_are_named(pair, options, reason):
    if "mm_injection" in options:
        options = {**options, "mm_projector_type": "query_vit"}
    assert reason in why_alone(pair(**options)[0])


def test_a_cache_with_a_window_and_fields_that_count_positions_are_named(pair):
    model, _ = pair("mistral")
    model.generation_config.min_new_tokens = 4
    assert "min_new_tokens" in why_alone(model)
    model.generation_config.min_new_tokens = None
    model.config.sliding_window = 16
    assert "DynamicSlidingWindowLayer" in why_alone(model)


def test_padding_of_ids_and_caches_stands_on_the_left(pair):
    ids = torch.tensor([[1, 2], [3, 4]])
    assert pad_left(ids, 4, 0).tolist() == [[0, 0, 1, 2], [0, 0, 3, 4]]
    assert pad_left(ids, 3, ids[:, -1:]).tolist() == [[2, 1, 2], [4, 3, 4]]
    model, processor = pair()
    caches = [model(**prepare(processor, [text], [None])[0], use_cache=True).past_key_values for text in QUESTIONS[:2]]
    short, long = (cache.get_seq_length() for cache in caches)
    both = join_caches(*caches, max(short, long))
    for joined, first, second in zip(*map(tensors_of, (both, *caches)), strict=True):
        for values, one, other in zip(joined, first, second, strict=True):
            assert torch.equal(values[:1, :, -short:], one)
            assert torch.equal(values[1:, :, -long:], other)
