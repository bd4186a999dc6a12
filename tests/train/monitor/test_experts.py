"""Statistics of the MoE layers, summed and reported per layer."""

import pytest
import torch

from llava_lite.model.moe.block import RoutingContext
from llava_lite.train.monitor.experts import ExpertMeter, flat_report, report


def run(model, num_tokens=12, seed=0):
    """Run a batch of text through the model and return its routing."""
    ids = torch.randint(3, 50, (2, num_tokens), generator=torch.Generator().manual_seed(seed))
    routing = RoutingContext()
    model.train()(input_ids=ids, labels=ids, routing=routing)
    return routing


def test_report_of_a_row_that_a_person_can_compute():
    # Two experts: 6 and 2 assignments, 1 dropped, balance losses 1.5 + 0.5 of two micro-batches.
    assert report(torch.tensor([6.0, 2.0, 1.0, 2.0, 2.0])) == {
        "load": [0.75, 0.25],
        "dead": 0,
        "dropped": 0.125,
        "balance_loss": 1.0,
    }
    assert report(torch.tensor([4.0, 0.0, 0.0, 2.0, 1.0]))["dead"] == 1


def test_meter_reports_of_one_batch_what_the_model_returns(toy_model):
    model = toy_model(moe={"moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2})
    routing = run(model)
    meter = ExpertMeter()
    meter.add(routing)
    reports = meter.read(lambda row: row)
    assert sorted(reports) == [0, 2]
    for (layer, stats), loss in zip(routing.stats().items(), routing.balance_losses(), strict=True):
        assert reports[layer]["load"] == pytest.approx(stats["load"].tolist(), abs=1e-6)
        assert reports[layer]["dead"] == stats["dead"]
        assert reports[layer]["balance_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert meter.read(lambda row: row) == {}


def test_micro_batches_and_ranks_add_up(toy_model):
    model = toy_model(moe={"moe_mode": "dense", "num_experts": [2], "top_k_experts": 1})
    meter, loads, losses = ExpertMeter(), torch.zeros(2), []
    for seed in (1, 2, 3):
        routing = run(model, seed=seed)
        meter.add(routing)
        loads += routing.stats()[0]["load"] * routing.stats()[0]["tokens"]
        losses.append(routing.balance_losses()[0].item())
    # Two ranks that did the same.
    first = meter.read(lambda row: row * 2)[0]
    assert first["load"] == pytest.approx((loads / loads.sum()).tolist(), abs=1e-6)
    assert first["balance_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_flat_report_is_one_number_a_name():
    flat = flat_report({2: {"load": [0.75, 0.25], "dead": 0, "dropped": 0.1, "balance_loss": 1.2}})
    assert flat == {
        "moe_layer_2/load_0": 0.75,
        "moe_layer_2/load_1": 0.25,
        "moe_layer_2/dead": 0,
        "moe_layer_2/dropped": 0.1,
        "moe_layer_2/balance_loss": 1.2,
    }
