"""Tokens are drawn by temperature, nucleus and seed, and certain ones stand whatever rounding does."""

import pytest
import torch

from llava_lite.serve.api.sampling import RouterWatch, Sampling, lead, nucleus, rounding_error

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}


def test_draws_follow_the_probabilities_of_the_temperature():
    logits, sampling = torch.tensor([0.0, 1.0, 2.0]), Sampling(temperature=2.0, top_p=1.0, seed=0)
    drawn = torch.tensor([sampling.draw(logits)[0] for _ in range(4000)])
    expected = (logits / 2).softmax(0)
    # Three standard deviations of a fraction of 4000 draws are at most 3 * 0.5 / sqrt(4000) = 0.024.
    assert torch.allclose(drawn.bincount(minlength=3) / 4000, expected, atol=0.024)


def test_the_same_seed_draws_the_same_and_a_restart_begins_again():
    logits = torch.zeros(500)
    first, second, other = (Sampling(1.0, 1.0, seed) for seed in (7, 7, 8))
    drawn = [first.draw(logits)[0] for _ in range(20)]
    assert drawn == [second.draw(logits)[0] for _ in range(20)]
    assert drawn != [other.draw(logits)[0] for _ in range(20)]
    first.restart()
    assert drawn == [first.draw(logits)[0] for _ in range(20)]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (0.45, [1]), (0.55, [1, 2]), (0.85, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1.1, [0, 1, 2, 3])],
)
def test_a_nucleus_holds_the_most_probable_words_that_add_up(top_p, kept):
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    assert nucleus(probabilities.log(), top_p).nonzero().flatten().tolist() == kept


def test_only_the_words_of_the_nucleus_are_drawn():
    sampling = Sampling(1.0, 0.55, seed=1)
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    assert {sampling.draw(logits)[0] for _ in range(300)} == {1, 2}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_a_certain_token_is_drawn_from_every_rounding_of_the_scores(temperature, top_p):
    generator = torch.Generator().manual_seed(3)
    error, num_certain = 0.05, 0
    for seed in range(400):
        scores = torch.randn(40, generator=generator) * 2
        token, is_certain = Sampling(temperature, top_p, seed).draw(scores, error)
        # A certain lead is of two scores, each of which may be off by half of it.
        rounded = scores + (torch.rand(40, generator=generator) - 0.5) * error
        same = Sampling(temperature, top_p, seed).draw(rounded)[0] == token
        assert same or not is_certain
        num_certain += is_certain
    assert 100 < num_certain < 400


def test_equal_words_at_the_edge_of_a_nucleus_are_not_certain():
    # Either of the two may be the one that is kept.
    assert not Sampling(1.0, 0.5, seed=0).draw(torch.tensor([1.0, 1.0, -9.0]), 1e-5)[1]
    assert Sampling(1.0, 0.5, seed=0).draw(torch.tensor([2.0, 1.0, -9.0]), 1e-5)[1]


def test_a_lead_is_that_of_the_last_chosen_over_the_first_that_is_not():
    scores = torch.tensor([[5.0, 1.0, 4.0], [2.0, 2.0, 0.0]])
    assert lead(scores).tolist() == [1.0, 0.0]
    assert lead(scores, 2).tolist() == [3.0, 2.0]


def test_the_rounding_error_grows_with_the_values_and_the_dtype():
    values = torch.tensor([[1.0, -8.0]])
    assert rounding_error(values, torch.float32).tolist() == [64 * 8 * 2**-23]
    assert rounding_error(values, torch.bfloat16).tolist() == [64 * 8 * 2**-7]


def test_a_sequence_whose_experts_tie_is_not_certain(toy_model):
    model = toy_model(moe=MOE)
    block = next(iter(model.moe_layers().values()))
    with torch.no_grad():
        block.gate.weight.zero_()
        # Experts 1 and 2 tie for the second place if the first feature is 1, and not if the second one is.
        block.gate.weight[:, 0] = torch.tensor([3.0, 2.0, 2.0, 1.0])
        block.gate.weight[:, 1] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    hidden = torch.eye(32)[:2][:, None]
    with RouterWatch(model) as watch:
        block(hidden)
        assert watch.certain(2).tolist() == [False, True]
        block(hidden[1:])
        assert watch.certain(1).tolist() == [True]
    block(hidden)
    assert watch.certain(2).tolist() == [True, True], "nothing is looked at once the context has ended"
