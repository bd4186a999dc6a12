"""On a GPU a model that goes on generating takes a cache of fixed size and a compiled step; elsewhere it does not."""

import pytest
import torch
from transformers import GenerationConfig

from llava_lite.model import generation
from llava_lite.model.kv_cache import GrowingLayer

PROMPT = torch.tensor([[1, 300, 301, 302, 303]])
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}


@pytest.fixture
def on_cuda(monkeypatch):
    """Return a function: model -> the same model, which says that its device is CUDA where `generate` asks."""

    class Device:
        type = "cuda"

    def pretend(model):
        stand_in = type(model)
        monkeypatch.setattr(stand_in, "wants_fixed_size", asked(stand_in.wants_fixed_size))
        monkeypatch.setattr(stand_in, "count_steps", asked(stand_in.count_steps))
        return model

    def asked(method):
        def answer(self, *arguments):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(self), "device", Device(), raising=False)
                return method(self, *arguments)

        return answer

    return pretend


def caches_of(model):
    """Return a list that fills with (attention, cache) of every call of the model."""
    seen = []

    def note(module, arguments, keywords):
        seen.append((module.config._attn_implementation, keywords["past_key_values"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def say(model, **arguments):
    return model.generate(PROMPT, do_sample=False, **{"max_new_tokens": 32, "min_new_tokens": 32} | arguments)


def test_after_enough_steps_the_cache_is_transformers_static_one(toy_model, on_cuda, monkeypatch):
    monkeypatch.setattr(generation, "STEPS_BEFORE_COMPILING", 40)
    model = on_cuda(toy_model())
    model.config._attn_implementation = "varlen"
    expected = say(model)
    assert model.steps_made == 32
    assert torch.equal(say(model), expected)
    seen = caches_of(model)
    assert torch.equal(say(model), expected)
    assert {attention for attention, _ in seen} == {"sdpa"}
    assert model.config._attn_implementation == "varlen"
    layer = seen[0][1].layers[0]
    assert layer.is_compileable
    assert layer.max_cache_len == 1024
    assert model.steps_made == 96


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 31, "min_new_tokens": 0},
        {"num_beams": 2},
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"generation_config": GenerationConfig(max_new_tokens=32, num_beams=2)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_who_asks_for_something_else_gets_it(arguments, toy_model, on_cuda):
    model = on_cuda(toy_model())
    model.steps_made = 10**6
    assert model.wants_fixed_size({"max_new_tokens": 32})
    assert not model.wants_fixed_size({"max_new_tokens": 32} | arguments)


def test_experts_and_the_cpu_keep_the_growing_cache(toy_model, on_cuda):
    plain, sparse = toy_model(), toy_model(moe=MOE)
    for model in (plain, sparse):
        model.steps_made = 10**6
    assert not plain.wants_fixed_size({"max_new_tokens": 32})
    seen = caches_of(plain)
    say(plain)
    assert isinstance(seen[0][1].layers[0], GrowingLayer)
    assert plain.steps_made == 10**6
    assert not on_cuda(sparse).wants_fixed_size({"max_new_tokens": 32})
