"""Flops, MFU and tokens a second, against numbers that a person can compute."""

import time

import pytest
import torch

from llava_lite.model.plain_paths import set_plain_paths
from llava_lite.train.monitor.throughput import (
    Flops,
    Meter,
    Work,
    count_batch,
    measured_peak_flops,
    mfu,
    peak_flops,
    step_flops,
)

# The toys: width 32, MLP 64, 4 layers, keys and values 16 wide; norms of 32 twice a layer.
LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
DECODER = 4 * LAYER
CONNECTOR = 2 * (32 * 32 + 32)


def get_weights(*modules):
    return sum(param.numel() for module in modules for param in module.parameters())


def test_mfu_of_a_run_that_a_person_can_compute():
    # 1,000 tokens a second of a model with 1e9 trained weights on a chip of 12e12 flops/s: half of it.
    assert mfu(1000, 6e9, 12e12) == 0.5


def test_flops_of_a_frozen_model_after_a_trained_connector(toy_model):
    model = toy_model()
    model.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    flops = step_flops(model)
    assert get_weights(*model.model.layers) == 4 * LAYER
    # Frozen after the first trained weight: forward, and the gradient of its input.
    assert flops.per_token == 4 * DECODER
    assert flops.per_supervised == 4 * get_weights(model.lm_head)
    tower = model.get_vision_tower()
    patches = 2 * 16 * 3 * 8 * 8 * 32
    read = 2 * 17 * get_weights(*tower.layers[:2])
    assert flops.per_image == patches + read + 6 * 16 * CONNECTOR


def test_flops_of_full_tuning(toy_model):
    model = toy_model()
    model.get_vision_tower().requires_grad_(False)
    flops = step_flops(model)
    assert flops.per_token == 6 * DECODER
    assert flops.per_supervised == 6 * get_weights(model.lm_head)
    # A head that makes all logits pays for them.
    set_plain_paths(model, ("loss",))
    plain = step_flops(model)
    assert (plain.per_token, plain.per_supervised) == (6 * (4 * LAYER + get_weights(model.lm_head)), 0)


def test_a_token_counts_the_experts_it_is_routed_to(toy_model):
    dense, moe = toy_model(), toy_model(moe={"moe_mode": "dense", "num_experts": [4], "top_k_experts": 2})
    router, mlp = 4 * 32, 3 * 32 * 64
    assert step_flops(dense).per_token == 6 * DECODER
    assert step_flops(moe).per_token == 6 * 4 * (LAYER + router + mlp)


def test_nothing_trained_costs_a_forward_pass(toy_model):
    model = toy_model()
    model.requires_grad_(False)
    assert step_flops(model).per_token == 2 * DECODER


def test_batch_counts_leave_padding_out():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, -100], [-100, -100, 3, 4]]),
        "images": torch.zeros(3, 3, 2, 2),
    }
    # The first position is never predicted, whatever its label.
    assert count_batch(batch).tolist() == [7, 3, 3, 8, 2]
    del batch["images"]
    assert count_batch(batch).tolist() == [7, 3, 0, 8, 2]
    batch["images"] = [torch.zeros(3, 2, 2), torch.zeros(2, 3, 2, 2)]
    assert count_batch(batch).tolist() == [7, 3, 3, 8, 2]


def test_a_packed_row_counts_all_its_tokens():
    row = {"input_ids": torch.zeros(1, 6), "labels": torch.tensor([[-100, 7, -100, -100, 3, 4]])}
    assert count_batch(row).tolist() == [6, 3, 0, 6, 1]
    # Two records, of 4 and 2 tokens.
    row |= {"cu_seq_lens_q": torch.tensor([0, 4, 6]), "max_length_q": 4}
    assert count_batch(row).tolist() == [6, 3, 0, 8, 2]


def test_work_of_a_meter():
    work = Work(tokens=500, seconds=2.0, flops=5e9, peak=1e10)
    assert work.tokens_per_s == 250
    assert work.mfu == 0.25


def test_meter_adds_batches_and_leaves_pauses_out():
    meter = Meter(Flops(1.0, 10.0, 100.0), peak=1e9)
    batch = {
        "attention_mask": torch.ones(1, 4),
        "labels": torch.tensor([[-100, 1, 2, -100]]),
        "images": torch.zeros(1, 3, 2, 2),
    }
    meter.add(batch)
    meter.add(batch)
    before = meter.seconds()
    with meter.pause():
        time.sleep(0.2)
    assert meter.seconds() - before < 0.1
    work = meter.read()
    assert (work.tokens, work.flops) == (8, 8 + 40 + 200)
    assert meter.read().tokens == 0


def test_meter_resumes_from_a_checkpoint():
    meter, later = Meter(Flops(1.0, 0.0, 0.0), 1.0), Meter(Flops(1.0, 0.0, 0.0), 1.0)
    meter.add({"attention_mask": torch.ones(2, 3), "labels": torch.zeros(2, 3)})
    later.load_state(meter.state(), "cpu")
    assert later.read().tokens == 6


def test_known_devices_have_their_makers_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cuda"), torch.float16) == 312e12


def test_measured_peak_is_what_a_matmul_reaches():
    size, peak = 512, measured_peak_flops(torch.device("cpu"), torch.float32)
    a = torch.randn(size, size)
    start_s = time.perf_counter()
    for _ in range(10):
        a @ a
    reached = 10 * 2 * size**3 / (time.perf_counter() - start_s)
    # A busy machine: within a factor of ten either way.
    assert peak == pytest.approx(reached, rel=9) or reached == pytest.approx(peak, rel=9)
