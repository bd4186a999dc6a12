"""The router's maths, against DeepSpeed's gates on the same logits and against numbers worked out by hand."""

import math

import pytest
import torch

from llava_lite.model.moe.router import Router, balance_loss, expert_capacity, keep_within_capacity, route


def logits_of(num_tokens, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Squared normals favour some experts, so that capacities are reached.
    return torch.randn(num_tokens, num_experts, generator=generator) + torch.arange(num_experts) * 0.5


def deepspeed_gate(logits, top_k, factor, min_capacity, drop_tokens=True):
    """Return (balance loss, weights [S, E], kept [S, E]) of DeepSpeed's own gate functions."""
    moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    logits = logits.clone()
    if top_k == 1:
        loss, combine, dispatch, _ = moe.top1gating(
            logits, factor, min_capacity, use_rts=False, drop_tokens=drop_tokens
        )
    elif top_k == 2:
        loss, combine, dispatch, _ = moe.top2gating(
            logits, factor, min_capacity, top2_2nd_expert_sampling=False, drop_tokens=drop_tokens
        )
    else:
        loss, combine, dispatch, _ = moe.topkgating(logits, top_k, factor, min_capacity, drop_tokens=drop_tokens)
    return loss, combine.sum(2), dispatch.any(2)


def spread(routes, num_experts):
    """Return the weights of the assignments as [S, E], zero where an expert was not chosen."""
    return torch.zeros(len(routes.experts), num_experts).scatter(1, routes.experts, routes.weights)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2, 1.5])
@pytest.mark.parametrize("min_capacity", [0, 4])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(4, 4), (25, 4), (64, 3), (97, 8)])
def test_routes_equal_deepspeeds_gates(top_k, factor, min_capacity, num_tokens, num_experts):
    logits = logits_of(num_tokens, num_experts, seed=num_tokens + top_k)
    loss, weights, kept = deepspeed_gate(logits, top_k, factor, min_capacity)
    capacity = expert_capacity(num_tokens, num_experts, top_k, factor, min_capacity)
    ours = route(logits, top_k, capacity)
    assert torch.equal(spread(ours, num_experts) > 0, kept)
    # Sums of three or four numbers below 1, added in another order.
    torch.testing.assert_close(spread(ours, num_experts), weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.balance_loss, loss, rtol=0, atol=1e-6)
    assert ours.dropped == num_tokens * top_k - kept.sum()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_without_a_capacity_nothing_is_dropped_as_in_deepspeed(top_k):
    logits = logits_of(50, 4)
    loss, weights, _ = deepspeed_gate(logits, top_k, 1.0, 0, drop_tokens=False)
    ours = route(logits, top_k)
    torch.testing.assert_close(spread(ours, 4), weights, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.balance_loss, loss, rtol=0, atol=1e-6)
    assert ours.dropped == 0
    assert ours.load.sum() == 50 * top_k


def test_gradients_of_weights_and_loss_equal_deepspeeds():
    ours, theirs = (logits_of(40, 4).requires_grad_() for _ in range(2))
    routes = route(ours, 2, expert_capacity(40, 4, 2, 0.75, 0))
    (spread(routes, 4).square().sum() + routes.balance_loss).backward()
    moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    loss, combine, _, _ = moe.top2gating(theirs, 0.75, 0, top2_2nd_expert_sampling=False)
    (combine.sum(2).square().sum() + loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_two_assignments_split_the_weight_and_one_keeps_its_probability():
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()  # probabilities 1/7, 2/7, 4/7
    two, one = route(logits, 2), route(logits, 1)
    assert two.experts.tolist() == [[2, 1]]
    torch.testing.assert_close(two.weights, torch.tensor([[2 / 3, 1 / 3]]))
    torch.testing.assert_close(one.weights, torch.tensor([[4 / 7]]))


def test_first_assignments_come_before_second_ones_then_earlier_tokens():
    # Tokens 0 and 1 want expert 0 second, tokens 2 and 3 first; room for 3: token 1's second assignment is dropped.
    experts = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    kept = keep_within_capacity(torch.full((4, 2), 0.5), experts, 3)
    assert kept.tolist() == [[True, True], [True, False], [True, True], [True, False]]


def test_a_token_that_lost_one_expert_gives_the_other_all_its_weight_and_one_that_lost_both_none():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    routes = route(logits, 2, capacity=1)
    e = math.e
    torch.testing.assert_close(routes.weights, torch.tensor([[1.0, 0.0], [0.0, 0.0], [e / (1 + e), 1 / (1 + e)]]))
    # Expert 0 takes token 0, expert 1 token 2's first assignment, expert 2 token 2's second.
    assert routes.dropped == 3


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    even, order = torch.full((4, 4), 0.25), torch.arange(4).unsqueeze(1)
    torch.testing.assert_close(balance_loss(even, order), torch.tensor(1.0))
    one_hot = torch.eye(4)[torch.zeros(5, dtype=torch.long)]
    torch.testing.assert_close(balance_loss(one_hot, torch.zeros(5, 1, dtype=torch.long)), torch.tensor(4.0))


def test_no_token_costs_nothing_and_keeps_the_gradient():
    logits = torch.zeros(0, 4, requires_grad=True)
    routes = route(logits, 2, capacity=0)
    assert routes.balance_loss == 0
    routes.balance_loss.backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_capacity_above_the_token_count_drops_nothing(top_k):
    logits = logits_of(1, 4)
    routes = route(logits, top_k, expert_capacity(1, 4, top_k, 1.5, min_capacity=8))
    assert routes.dropped == 0
    torch.testing.assert_close(routes.weights, route(logits, top_k).weights)


def test_capacity_rounds_in_single_precision_as_deepspeed_does():
    assert expert_capacity(25, 2, 1, 1.2, 0) == 16
    assert math.ceil(1.2 * 25 / 2) == 15
    assert expert_capacity(8, 4, 2, 1.5, 0) == 6
    assert expert_capacity(8, 4, 2, 1.5, 7) == 7


def test_sampled_second_expert_follows_the_probabilities_of_the_rest():
    torch.manual_seed(0)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log().repeat(20000, 1)  # without the first: 3/6, 2/6, 1/6
    routes = route(logits, 2, sample_second=True)
    assert (routes.experts[:, 0] == 0).all()
    fractions = torch.bincount(routes.experts[:, 1], minlength=4) / 20000
    # Three standard deviations of 20000 draws are 0.011.
    torch.testing.assert_close(fractions, torch.tensor([0, 3 / 6, 2 / 6, 1 / 6]), rtol=0, atol=0.011)
    torch.testing.assert_close(routes.weights.sum(1), torch.ones(20000))
    assert torch.equal(route(logits, 2).experts, route(logits, 2).experts)


def test_logits_are_float32_under_autocast_and_in_a_bfloat16_model():
    router = Router(16, 4, dtype=torch.bfloat16)
    router.reset_parameters()
    tokens = torch.randn(5, 16, dtype=torch.bfloat16)
    expected = tokens.double() @ router.weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6)
