"""A decoding step of our own gives what the layers' own bodies give; what it cannot do it leaves to them."""

import pytest
import torch

from llava_lite.model import decoding, reading
from llava_lite.model.decoding import can_step
from llava_lite.model.kv_cache import GrowingCache
from llava_lite.model.plain_paths import set_plain_paths

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
SHAPED = ("llama", "mistral", "qwen2", "qwen3")
PROMPT = torch.tensor([[1, 300, 301, 302, 303], [1, 304, 305, 306, 307]])


@pytest.fixture
def steps(monkeypatch):
    """The shapes of the embeddings that `step` was called with."""
    seen, plain = [], decoding.step

    def noted(stack, embeds, *rest):
        seen.append(tuple(embeds.shape))
        return plain(stack, embeds, *rest)

    monkeypatch.setattr("llava_lite.model.llava_arch.step", noted)
    return seen


@pytest.fixture
def reads(monkeypatch):
    """Of each call of `read`: whether only the last positions were asked for."""
    seen, plain = [], reading.read

    def noted(*arguments):
        seen.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr("llava_lite.model.llava_arch.read", noted)
    return seen


def decode(model, plain, mask=None, num_steps=4):
    """Return the logits [B, V] of some steps behind a prompt whose rows are padded as `mask` says."""
    set_plain_paths(model, ["layers"] if plain else [])
    cache, mask = GrowingCache(model.config), torch.ones_like(PROMPT) if mask is None else mask
    ids, logits = PROMPT, []
    with torch.no_grad():
        for position in range(num_steps):
            where = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            arguments = {"attention_mask": mask, "position_ids": where, "past_key_values": cache, "use_cache": True}
            logits.append(model(ids, **arguments).logits[:, -1])
            ids = torch.tensor([[310 + position], [320 + position]])
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
    return torch.stack(logits)


@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("backbone", SHAPED)
def test_a_step_gives_what_the_layers_own_bodies_give(backbone, moe, padded, toy_model, steps):
    model = toy_model(backbone, moe=moe, **({"sliding_window": None} if backbone == "mistral" else {}))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) if padded else None
    expected = decode(model, plain=True, mask=mask)
    assert steps == []
    found = decode(model, plain=False, mask=mask)
    assert steps == [(2, 1, 32)] * 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def prompt_pass(model, mask, keep, plain):
    """Return (logits of a prompt, its cache) by the plain bodies or ours."""
    set_plain_paths(model, ["layers"] if plain else [])
    cache, where = GrowingCache(model.config), (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": where, "past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        return model(PROMPT, logits_to_keep=keep, **arguments).logits, cache


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("mask", [[[1] * 5, [1] * 5], [[0, 0, 1, 1, 1], [1] * 5]], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("backbone", SHAPED)
def test_a_prompt_is_read_to_what_the_layers_own_bodies_make_of_it(backbone, mask, keep, toy_model, reads):
    model = toy_model(backbone, **({"sliding_window": None} if backbone == "mistral" else {}))
    mask = torch.tensor(mask)
    expected, stock = prompt_pass(model, mask, keep, plain=True)
    assert reads == []
    found, ours = prompt_pass(model, mask, keep, plain=False)
    assert reads == [keep == 1]
    assert found.shape == expected.shape
    real = mask.bool()
    kept = real[:, -found.shape[1] :]
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)
    for one, other in zip(ours.layers, stock.layers, strict=True):
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
            mine, theirs = mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_experts_and_rows_that_end_in_padding_are_left_to_the_stock_pass(toy_model, reads):
    prompt_pass(toy_model(moe=MOE), torch.ones_like(PROMPT), 1, plain=False)
    prompt_pass(toy_model(), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), 1, plain=False)
    assert reads == []


@pytest.mark.parametrize("backbone", ["phi", "stablelm"])
def test_other_shapes_keep_their_own_bodies(backbone, toy_model, steps):
    model = toy_model(backbone)
    torch.testing.assert_close(decode(model, plain=False), decode(model, plain=True), atol=0, rtol=0)
    assert steps == []


def test_generate_goes_step_by_step_to_the_same_tokens(toy_model, steps):
    model = toy_model()
    plain = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    set_plain_paths(model, ["layers"])
    expected = model.generate(PROMPT, **plain)
    assert steps == []
    set_plain_paths(model, [])
    assert torch.equal(model.generate(PROMPT, **plain), expected)
    assert steps == [(2, 1, 32)] * 11


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_layers_of_which_some_slide_generate_in_a_static_cache(attention, moe, toy_model):
    # There transformers hands a mask for each kind of layer.
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    model = toy_model("qwen2", moe, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    model.set_attn_implementation(attention)
    told = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(PROMPT, **told)
    assert torch.equal(model.generate(PROMPT, cache_implementation="static", **told), expected)


def heard(model, listens):
    """Return whether a hook on a module of the first layer is called in a step."""
    calls = []
    module = model.get_submodule(f"model.layers.0{listens}")
    handle = module.register_forward_hook(lambda *call: calls.append(call))
    decode(model, plain=False, num_steps=2)
    handle.remove()
    return len(calls) == 2


@pytest.mark.parametrize(
    "listens", ["", ".self_attn", ".mlp", ".self_attn.q_proj", ".mlp.down_proj", ".input_layernorm"]
)
def test_who_listens_to_a_module_hears_every_step(listens, toy_model):
    assert heard(toy_model(), listens)


def test_what_is_asked_beside_the_hidden_states_is_left_to_the_stock_pass(toy_model, steps):
    model = toy_model()
    cache = GrowingCache(model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
        out = model(PROMPT[:, -1:], past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert steps == []


def test_a_step_is_taken_only_where_it_is_the_same(toy_model):
    model = toy_model()
    stack, cache, embeds = model.model, GrowingCache(model.config), torch.randn(2, 1, 32)
    usual = {"return_dict": True, "output_attentions": None}
    with torch.no_grad():
        assert not can_step(stack, embeds, None, cache, usual), "nothing is in the cache yet"
        model(PROMPT, past_key_values=cache, use_cache=True)
        assert can_step(stack, embeds, None, cache, usual)
        assert not can_step(stack, embeds, None, None, usual)
        assert not can_step(stack, None, None, cache, usual)
        assert not can_step(stack, embeds.expand(2, 3, 32), None, cache, usual)
        assert not can_step(stack, embeds.bfloat16(), None, cache, usual)
        assert not can_step(stack, embeds, torch.ones(2, 1, 1, 6), cache, usual)
        assert not can_step(stack, embeds, None, cache, {"return_dict": False})
        assert not can_step(stack, embeds, None, cache, {"cu_seq_lens_q": torch.tensor([0, 1])})
        model.set_attn_implementation("eager")
        assert not can_step(stack, embeds, None, cache, usual)
        model.set_attn_implementation("sdpa")
        assert not can_step(stack.train(), embeds, None, cache, usual)
    assert not can_step(stack.eval(), embeds, None, cache, usual), "a gradient may be wanted"


def test_lora_is_in_every_step(toy_model, steps):
    peft = pytest.importorskip("peft", reason="peft is an extra")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(toy_model(), config).eval().base_model.model
    adapted = decode(model, plain=True)
    torch.testing.assert_close(decode(model, plain=False), adapted, atol=1e-5, rtol=1e-5)
    assert len(steps) == 3
