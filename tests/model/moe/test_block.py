"""The MoE block: every implementation against a plain loop, padding, residual, checkpointing, and its config."""

import copy
import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from llava_lite.model.moe.block import (
    MoeBlock,
    RoutingContext,
    checkpoint_with_routing,
    init_moe_weights,
    moe_layer_indices,
    read_moe_config,
    use_routing,
)

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "llava_lite")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
KINDS = {
    "llama": (LlamaConfig(**SHAPE), LlamaMLP),
    "llama_bias": (LlamaConfig(**SHAPE, mlp_bias=True), LlamaMLP),
    "phi": (PhiConfig(**SHAPE), PhiMLP),
}


def block_of(kind="llama", num_experts=4, implementation="eager", **moe):
    """Return a block with different experts, seeded, in float32."""
    config, mlp_class = KINDS[kind]
    config = copy.deepcopy(config)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    settings = read_moe_config({"num_experts": num_experts, "moe_mode": "dense", **moe}, 1)
    block = MoeBlock(config, settings, num_experts, mlp_class(config))
    block.apply(lambda module: init_moe_weights(module, 0.3))
    with torch.no_grad():
        for name, param in block.experts.named_parameters():
            if name.endswith("_bias"):
                param.normal_(std=0.3)
    return block


def one_expert(block, expert, token):
    """Return what one expert makes of one token [D], from its slices of the fused weights."""
    experts = block.experts
    biased = experts.has_bias
    inner = getattr(experts, experts.up_name)[expert] @ token
    inner = inner + getattr(experts, f"{experts.up_name}_bias")[expert] if biased else inner
    inner = experts.act_fn(inner[:24]) * inner[24:] if experts.has_gate else experts.act_fn(inner)
    out = experts.down_proj[expert] @ inner
    return out + experts.down_proj_bias[expert] if biased else out


def plain_loop(block, hidden, top_k):
    """Return the block's output token by token, expert by expert."""
    rows = []
    for token in hidden.flatten(0, 1):
        probs = (block.gate.weight @ token).softmax(0)
        weights, chosen = probs.topk(top_k)
        if top_k > 1:
            weights = weights / weights.sum()
        rows.append(sum(w * one_expert(block, int(e), token) for w, e in zip(weights, chosen, strict=True)))
    return torch.stack(rows).view_as(hidden)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_every_implementation_equals_a_loop_over_tokens(implementation, kind, top_k):
    block = block_of(kind, implementation=implementation, top_k_experts=top_k)
    hidden = torch.randn(2, 9, 16)
    torch.testing.assert_close(block(hidden), plain_loop(block, hidden, top_k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_loop(implementation, kind):
    hidden, ahead = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    grads = []
    for forward in (lambda block, x: block(x), lambda block, x: plain_loop(block, x, 2)):
        block = block_of(kind, implementation=implementation)
        (forward(block, hidden) * ahead).sum().backward()
        grads.append({name: param.grad for name, param in block.named_parameters()})
    torch.testing.assert_close(*grads, rtol=0, atol=2e-5)
    assert grads[0]["gate.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_expert_and_changes_no_number(implementation, side):
    block = block_of(implementation=implementation, moe_drop_tokens=True, capacity_factor=0.75)
    short, long = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    padding = torch.full((1, 2, 16), 100.0)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0], [1] * 5])
    contexts = RoutingContext(mask, training=True), RoutingContext(training=True)
    with use_routing(contexts[0]):
        out = block(torch.cat([padded, long]))
    with use_routing(contexts[1]):
        rows = block(torch.cat([short, long], dim=1))[0]
    torch.testing.assert_close(out[mask.bool()], rows, rtol=0, atol=1e-6)
    assert not out[~mask.bool()].any()
    torch.testing.assert_close(contexts[0].balance_losses(), contexts[1].balance_losses())
    first, second = (context.stats()[0] for context in contexts)
    assert first.pop("load").tolist() == second.pop("load").tolist()
    assert first == second
    assert first["tokens"] == 8
    assert first["dropped"] > 0


def test_padding_counts_where_the_original_is_asked_for():
    block = block_of(moe_count_padding=True)
    hidden = torch.randn(1, 4, 16)
    context = RoutingContext(torch.tensor([[1, 1, 0, 0]]))
    with use_routing(context):
        out = block(hidden)
    torch.testing.assert_close(out, plain_loop(block, hidden, 2), rtol=0, atol=1e-5)
    assert context.stats()[0]["tokens"] == 4


def test_with_a_cache_the_last_columns_of_the_mask_count():
    context = RoutingContext(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert context.real_positions(2, 2).tolist() == [0, 1, 2]
    assert context.real_positions(2, 4).tolist() == [1, 2, 3, 4, 5, 6]
    assert RoutingContext(torch.ones(2, 4)).real_positions(2, 4) is None
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the hidden states have 3 sequences of 4"):
        context.real_positions(3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_mixes_the_dense_mlp_in_by_two_trained_weights(kind):
    block = block_of(kind, use_residual=True)
    hidden = torch.randn(2, 3, 16)
    mixture = block.coefficient(hidden).softmax(-1)
    expected = mixture[..., :1] * plain_loop(block, hidden, 2) + mixture[..., 1:] * block.mlp(hidden)
    torch.testing.assert_close(block(hidden), expected, rtol=0, atol=1e-5)
    assert {"mlp.", "coefficient."} <= {name.split(".")[0] + "." for name in block.state_dict()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_is_counted_dead_and_gets_a_zero_gradient(implementation):
    block = block_of(implementation=implementation)
    with torch.no_grad():
        block.gate.weight[3] = -block.gate.weight[:3].mean(0) * 50
    hidden = block.gate.weight[:3].mean(0).expand(2, 5, 16) + torch.randn(2, 5, 16) * 0.01
    block.layer_idx = 7
    with use_routing(RoutingContext(training=True)) as routing:
        block(hidden.detach()).square().sum().backward()
    stats = routing.stats()
    assert stats[7]["dead"] >= 1
    assert stats[7]["load"][3] == 0
    assert stats[7]["load"].sum() == pytest.approx(1)
    assert not block.experts.gate_up_proj.grad[3].any()
    assert block.experts.gate_up_proj.grad[:3].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_padding_alone_keeps_every_weight_in_the_graph(implementation):
    block = block_of(implementation=implementation, use_residual=True)
    with use_routing(RoutingContext(torch.zeros(1, 3), training=True)) as routing:
        out = block(torch.randn(1, 3, 16))
    (out.sum() + routing.balance_losses()[0]).backward()
    assert not out.any()
    assert all(param.grad is not None and not param.grad.any() for param in block.parameters())


def checkpointed_router_gradient(use_reentrant=None):
    """Return (gradient, context) of a block's router under loss + balance loss; None for no checkpoint."""
    block = block_of(moe_second_expert_sampling=True)
    context = RoutingContext(torch.tensor([[1, 1, 1, 1, 0]]), training=True)
    hidden = torch.linspace(-1, 1, 80).view(1, 5, 16).requires_grad_()
    torch.manual_seed(1)
    with use_routing(context):
        if use_reentrant is None:
            out = block(hidden)
        else:
            out = checkpoint_with_routing(checkpoint, block, hidden, use_reentrant=use_reentrant)
    # Outside: the recomputation must find the context by itself.
    (out.square().sum() + context.balance_losses()[0]).backward()
    return block.gate.weight.grad, context


def test_checkpointing_keeps_the_routers_gradient_and_counts_once():
    expected, plain = checkpointed_router_gradient()
    grad, context = checkpointed_router_gradient(use_reentrant=False)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    assert context.stats()[0]["tokens"] == plain.stats()[0]["tokens"] == 4
    assert len(context.balance_losses()) == 1


def test_reentrant_checkpointing_would_silence_the_balance_loss():
    expected, _ = checkpointed_router_gradient()
    grad, context = checkpointed_router_gradient(use_reentrant=True)
    assert not context.balance_losses()[0].requires_grad
    assert (grad - expected).abs().max() > 1e-4


def test_capacity_follows_the_mode_of_the_forward_pass():
    block = block_of(moe_drop_tokens=True, capacity_factor=0.25, eval_capacity_factor=2.0)
    hidden = torch.randn(1, 16, 16)
    dropped = {}
    for training in (True, False):
        with use_routing(RoutingContext(training=training)) as routing:
            block(hidden)
        dropped[training] = routing.stats()[0]["dropped"]
    # Four experts with room for 2 of 16 tokens each leave at most 8 of 32 assignments; twice the capacity fits all 16.
    assert dropped[True] >= 0.75
    assert dropped[False] == 0


def test_sampling_is_for_training_unless_always_is_asked_for():
    hidden = torch.randn(1, 200, 16)
    for sampling, training, changes in ((True, True, True), (True, False, False), ("always", False, True)):
        block = block_of(moe_second_expert_sampling=sampling)
        with use_routing(RoutingContext(training=training)):
            assert (not torch.equal(block(hidden), block(hidden))) == changes


def test_a_model_can_be_copied_after_a_forward_pass():
    block = block_of()
    with use_routing(RoutingContext(training=True)):
        out = block(torch.ones(1, 2, 16))
    torch.testing.assert_close(copy.deepcopy(block)(torch.ones(1, 2, 16)), out)


def test_a_trained_block_asks_for_its_inputs_gradient_and_a_frozen_one_does_not():
    block, seen = block_of(), []
    block.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    block(torch.randn(1, 2, 16))
    block.requires_grad_(False)(torch.randn(1, 2, 16))
    with torch.no_grad():
        block.requires_grad_(True)(torch.randn(1, 2, 16))
    assert seen == [True, False, False]


def test_bfloat16_weights_mix_in_float32():
    block = block_of("llama").bfloat16()
    hidden = torch.randn(1, 6, 16).bfloat16()
    exact = plain_loop(copy.deepcopy(block).float(), hidden.float(), 2)
    for implementation in IMPLEMENTATIONS:
        block.experts.config._experts_implementation = implementation
        out = block(hidden)
        assert out.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: two multiplications and a sum of numbers up to about 4.
        torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.06)


def test_an_mlp_of_unknown_layers_is_refused():
    config, _ = KINDS["llama"]
    settings = read_moe_config({"moe_mode": "dense"}, 1)
    mlp = torch.nn.ModuleDict({"w1": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="ModuleDict has layers w1; experts are made from gate_proj"):
        MoeBlock(config, settings, 4, mlp)


@pytest.mark.parametrize(
    ("mode", "num_layers", "layers"),
    [
        ("first_half", 5, (0, 1)),
        ("second_half", 5, (2, 3, 4)),
        ("sparse", 5, (0, 2, 4)),
        ("dense", 3, (0, 1, 2)),
    ],
)
def test_modes_choose_moe_llavas_layers(mode, num_layers, layers):
    assert moe_layer_indices(mode, num_layers) == layers
    assert moe_layer_indices(mode, num_layers, [1]) == (1,)


def test_dense_models_have_no_moe_config():
    assert read_moe_config(None, 4) is None
    assert read_moe_config({}, 4) is None
    assert read_moe_config({"moe_enable": False, "num_experts": [4]}, 4) is None


def test_one_number_of_experts_is_for_all_layers_and_a_list_for_one_each():
    assert read_moe_config({"num_experts": 8, "moe_mode": "sparse"}, 4).num_experts == (8, 8)
    assert read_moe_config({"num_experts": [8], "moe_mode": "sparse"}, 4).num_experts == (8, 8)
    given = read_moe_config({"num_experts": [2, 3, 4], "moe_mode": "custom", "moe_layers_idx": [5, 0, 2]}, 6)
    assert (given.layers, given.num_experts) == ((0, 2, 5), (3, 4, 2))


def test_a_config_survives_json():
    config = read_moe_config({"num_experts": [2, 3], "moe_mode": "sparse", "train_modules": ["wg"]}, 4)
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["moe_layers_idx"] == [0, 2]
    assert read_moe_config(stored, 4).to_dict() == stored


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"moe_mode": "third"}, "unknown moe_mode 'third'; known: first_half, second_half, sparse, dense, custom"),
        ({"moe_mode": "custom"}, "'custom' needs moe_layers_idx"),
        ({"moe_layers_idx": [0, 4]}, r"different layers of 0\.\.3; got \[0, 4\]"),
        ({"moe_layers_idx": [1, 1]}, r"different layers of 0\.\.3; got \[1, 1\]"),
        ({"moe_layers_idx": []}, "chooses none of 4 layers"),
        ({"num_experts": [4, 4, 4]}, r"3 numbers \[4, 4, 4\] for 2 MoE layers \[2, 3\]"),
        ({"num_experts": 0}, "at least 1; got"),
        ({"num_experts": [4, 2], "top_k_experts": 3}, r"top_k_experts must be 1\.\.2, .* got 3"),
        ({"capacity_factor": 0}, "capacity_factor must be above 0; got 0"),
        ({"min_capacity": -1}, "min_capacity must be at least 0; got -1"),
        ({"ep_size": 0}, "ep_size must be at least 1; got 0"),
        ({"moe_second_expert_sampling": "often"}, "got 'often'"),
        ({"moe_second_expert_sampling": True, "top_k_experts": 1}, "draws the second of two experts; .* 1"),
        ({"num_expert": 4}, "unknown keys in config.moe: num_expert; known: num_experts, moe_enable"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(moe, message):
    with pytest.raises(ValueError, match=message):
        read_moe_config(moe, 4)
