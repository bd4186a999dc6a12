"""Upcycling: the model answers as before, on one process or partitioned by ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llava_lite.model.moe.block import MoeBlock, RoutingContext, use_routing
from llava_lite.model.moe.upcycle import upcycle

BACKBONES = ("llama", "mistral", "phi", "qwen2", "qwen3", "stablelm")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 12, 13, 14, 15]])
MASK = (IDS != 0).long()


@pytest.fixture
def dense_model(toy_llm_dir):
    """Return a function: model_type -> dense decoder of transformers in float32."""
    return lambda model_type="llama": AutoModelForCausalLM.from_pretrained(toy_llm_dir(model_type)).eval()


def logits(model, ids=IDS, mask=MASK):
    """Return the logits at real tokens, with the padding mask for the MoE layers too."""
    with use_routing(RoutingContext(mask)), torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("model_type", BACKBONES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "llava_lite"])
@pytest.mark.parametrize("moe", [{"top_k_experts": 2}, {"top_k_experts": 3, "use_residual": True}])
def test_upcycled_model_equals_the_dense_one(dense_model, model_type, implementation, moe):
    model = dense_model(model_type)
    expected = logits(model)
    upcycle(model, {"num_experts": 4, "moe_mode": "sparse", **moe})
    model.config._experts_implementation_internal = implementation
    found = logits(model)
    # Float32 rounding of logits up to 4.6; relative to the largest of them.
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_a_block_of_copies_equals_the_mlp_it_copied(dense_model, model_type):
    model = dense_model(model_type)
    dense = model.model.layers[0].mlp
    upcycle(model, {"num_experts": 4, "moe_mode": "sparse"})
    hidden = torch.randn(3, 7, 32) / 4
    torch.testing.assert_close(model.model.layers[0].mlp(hidden), dense(hidden), rtol=0, atol=1e-6)


def test_one_assignment_scales_the_dense_mlp_by_its_probability(dense_model):
    model = dense_model()
    dense = model.model.layers[0].mlp
    upcycle(model, {"num_experts": 4, "moe_mode": "first_half", "top_k_experts": 1})
    hidden = torch.randn(1, 6, 32)
    block = model.model.layers[0].mlp
    probs = block.gate(hidden[0]).softmax(-1).max(-1).values
    torch.testing.assert_close(block(hidden)[0], dense(hidden)[0] * probs[:, None], rtol=1e-5, atol=1e-5)


def test_layers_get_the_numbers_of_experts_that_were_asked_for(dense_model):
    model = dense_model()
    upcycle(model, {"num_experts": [2, 3], "moe_mode": "sparse"})
    blocks = [layer.mlp for layer in model.model.layers]
    assert [isinstance(block, MoeBlock) for block in blocks] == [True, False, True, False]
    assert [blocks[i].experts.gate_up_proj.shape for i in (0, 2)] == [(2, 128, 32), (3, 128, 32)]
    assert [blocks[i].gate.weight.shape for i in (0, 2)] == [(2, 32), (3, 32)]
    assert model.config.moe["num_experts"] == [2, 3]
    assert model.config.moe["moe_layers_idx"] == [0, 2]
    json.dumps(model.config.to_dict())


def test_routers_are_uniform_seeded_and_differ_between_layers(dense_model):
    first, again, other = dense_model(), dense_model(), dense_model()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        torch.rand(seed)
        upcycle(model, {"num_experts": 64, "moe_mode": "sparse"}, seed=seed)
    gates = [model.model.layers[0].mlp.gate.weight for model in (first, again, other)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert not torch.equal(gates[0], first.model.layers[2].mlp.gate.weight)
    bound = 32**-0.5
    assert 0.98 * bound < gates[0].abs().max() <= bound
    # A uniform draw from -b..b has the standard deviation b / sqrt(3); 2,048 numbers show it to about 2%.
    assert gates[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_dtype_and_mode_of_the_dense_model_stay(dense_model):
    model = dense_model().bfloat16().train()
    upcycle(model, {"num_experts": 2, "moe_mode": "dense", "use_residual": True})
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


def test_decoding_token_by_token_equals_one_pass(dense_model):
    model = dense_model("phi")
    upcycle(model, {"num_experts": 4, "moe_mode": "sparse"})
    with torch.no_grad():
        for param in model.model.layers[0].mlp.experts.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    cache, steps = None, []
    for t in range(IDS.shape[1]):
        positions = (MASK[:, : t + 1].cumsum(1) - 1).clamp(min=0)[:, -1:]
        with use_routing(RoutingContext(MASK[:, : t + 1])), torch.no_grad():
            out = model(
                IDS[:, t : t + 1], attention_mask=MASK[:, : t + 1], position_ids=positions, past_key_values=cache
            )
        cache = out.past_key_values
        steps.append(out.logits)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    with use_routing(RoutingContext(MASK)), torch.no_grad():
        expected = model(IDS, attention_mask=MASK, position_ids=positions).logits
    torch.testing.assert_close(torch.cat(steps, dim=1)[MASK.bool()], expected[MASK.bool()], rtol=0, atol=1e-4)


def test_a_model_with_experts_is_refused(dense_model):
    model = dense_model()
    upcycle(model, {"num_experts": 2, "moe_mode": "sparse"})
    with pytest.raises(ValueError, match=r"layers \[0, 2\] of this model have experts already"):
        upcycle(model, {"num_experts": 4, "moe_mode": "dense"})


@pytest.mark.parametrize("moe", [None, {"moe_enable": False, "num_experts": [4]}])
def test_a_dict_that_asks_for_no_experts_is_refused(dense_model, moe):
    with pytest.raises(ValueError, match="it needs moe_enable true"):
        upcycle(dense_model(), moe)


def test_checkpointing_of_the_full_model_keeps_every_gradient(toy_model):
    grads = []
    for checkpointing in (False, True):
        model = toy_model(tower=None).train()
        upcycle(model, {"num_experts": 4, "moe_mode": "sparse"})
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        context = RoutingContext()
        model(IDS, attention_mask=MASK, labels=IDS, routing=context).loss.backward()
        assert context.stats()[0]["tokens"] == MASK.sum()
        grads.append({name: param.grad for name, param in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[0]["model.layers.2.mlp.gate.weight"].abs().max() > 1e-3


def test_under_zero3_it_is_the_same_model_and_takes_the_same_step(tmp_path):
    pytest.importorskip("deepspeed")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.2, **shape)).save_pretrained(tmp_path / "dense")
    worker = Path(__file__).with_name("zero3_upcycle_worker.py")
    out = tmp_path / "results.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launcher, str(worker), str(tmp_path / "dense"), str(out)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for case, distances in json.loads(out.read_text()).items():
        assert distances["upcycled"] == 0, case
        # Gradients of two ranks are summed in another order than those of two batches.
        assert distances["stepped"] < 1e-6, case


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_model_with_experts_runs_them_by_our_own_function_and_lets_the_user_choose(toy_model, model_type):
    model = toy_model(model_type, moe={"num_experts": 4, "moe_mode": "sparse"}, tower=None)
    assert model.config._experts_implementation == "llava_lite"
    with torch.no_grad():
        grouped = model(IDS, attention_mask=MASK).logits
        model.set_experts_implementation("eager")
        assert model.moe_layers()[0].experts.config._experts_implementation == "eager"
        eager = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(grouped[MASK.bool()], eager[MASK.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_model_built_from_its_config_has_its_experts_drawn(toy_model, model_type):
    moe = {"num_experts": 4, "moe_mode": "sparse", "use_residual": True}
    config = toy_model(model_type, moe=moe, tower=None).config
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to is NaN then
    try:
        model = type(toy_model(model_type, tower=None))(config)
    finally:
        torch.use_deterministic_algorithms(False)
    block = model.moe_layers()[0]
    for name, param in block.named_parameters():
        assert param.isfinite().all(), name
    up = getattr(block.experts, block.experts.up_name)
    assert up.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert block.gate.weight.abs().max() <= 32**-0.5
