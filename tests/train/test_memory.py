"""The memory of a step, by hand and by what autograd keeps, and how many layers are checkpointed for it."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_lite.model import model_class_for
from llava_lite.model.plain_paths import set_plain_paths
from llava_lite.train.memory import (
    GIB,
    Memory,
    activation_bytes,
    checkpoint_layers,
    choose_checkpointing,
    estimate_memory,
    fewest_checkpointed,
    free_ram,
    gib,
    layer_activation_bytes,
    longest_batch,
    loss_bytes,
    memory_lines,
    offload_of_run,
    offloaded,
    spread_layers,
    weight_bytes,
)
from llava_lite.train.plan import plan_of_run

NUM_TOKENS = 48
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}


def small_model(model_type, top_k=0, **more):
    """Return a decoder without a tower."""
    model_class = model_class_for(model_type)
    moe = {"moe_mode": "dense", "num_experts": [4], "top_k_experts": top_k} if top_k else None
    config = model_class.config_class(vocab_size=20, num_key_value_heads=4, moe=moe, **SHAPE, **more)
    return model_class(config).train()


def packed_row():
    """Return two samples in one row, as a collator describes them."""
    ends = torch.tensor([0, 20, NUM_TOKENS], dtype=torch.int32)
    positions = torch.cat([torch.arange(20), torch.arange(NUM_TOKENS - 20)])[None]
    lengths = {"max_length_q": 28, "max_length_k": 28}
    return {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **lengths}


def bytes_kept(model, dtype, **batch):
    """Return the bytes that the decoder keeps for its backward pass, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    embeds = torch.randn(1, NUM_TOKENS, model.config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(inputs_embeds=embeds, **batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "top_k"),
    [("llama", 0), ("phi", 0), ("qwen2", 0), ("qwen3", 0), ("stablelm", 0), ("llama", 2), ("phi", 1)],
)
def test_activations_are_what_autograd_keeps(model_type, top_k, dtype, trains, is_packed):
    model = small_model(model_type, top_k, **({"head_dim": 32} if model_type == "qwen3" else {})).to(dtype)
    model.requires_grad_(trains)
    model.set_attn_implementation("varlen" if is_packed else "sdpa")
    batch = packed_row() if is_packed else {"attention_mask": torch.ones(1, NUM_TOKENS, dtype=torch.long)}
    # Not in the formula: routing tables, the last norm, angles of the positions.
    estimate = activation_bytes(model, NUM_TOKENS, dtype.itemsize)
    assert estimate == pytest.approx(bytes_kept(model, dtype, **batch), rel=0.12)


def test_rms_norm_saves_its_normalised_activations_too():
    model = small_model("llama")
    kept = layer_activation_bytes(model.model.layers[0], model.config, 4)
    model.model.layers[0].input_layernorm = torch.nn.LayerNorm(128)
    assert layer_activation_bytes(model.model.layers[0], model.config, 4) == kept - 4 * 0.5 * 128


@pytest.mark.parametrize("num_checkpointed", [1, 2, 3])
def test_checkpointed_layers_keep_their_input_alone(num_checkpointed):
    model = small_model("llama")
    batch = {"attention_mask": torch.ones(1, NUM_TOKENS, dtype=torch.long)}
    checkpoint_layers(model, spread_layers(3, num_checkpointed))
    kept = bytes_kept(model, torch.float32, **batch)
    layer = NUM_TOKENS * layer_activation_bytes(model.model.layers[0], model.config, 4)
    estimate = activation_bytes(model, NUM_TOKENS, 4, num_checkpointed)
    # What a recompute takes is not there yet when the forward pass ends; the last norm, not in the formula, is.
    expected = estimate - (layer if num_checkpointed == 3 else 0) + NUM_TOKENS * 4 * 2 * 128
    assert expected == pytest.approx(kept, rel=0.12)


def test_a_layer_of_the_toys_keeps_what_the_formula_says(toy_model):
    model = toy_model()
    layer, config = model.model.layers[0], model.config
    # 4 bytes x (2 norms x 2.5 + queries and outputs x 3, 32 wide; keys and values 16 wide; 4 of 64), trained.
    assert layer_activation_bytes(layer, config, 4) == 4 * (8 * 32 + 2 * 16 + 4 * 64)
    layer.requires_grad_(False)
    assert layer_activation_bytes(layer, config, 2) == 2 * (6 * 32 + 2 * 16 + 3 * 64)


def test_layers_are_spread_and_the_last_is_taken_only_with_all():
    assert spread_layers(8, 0) == set()
    assert spread_layers(8, 1) == {0}
    assert spread_layers(8, 2) == {0, 4}
    assert spread_layers(8, 4) == {0, 2, 4, 6}
    assert spread_layers(8, 7) == {0, 1, 2, 3, 4, 5, 6}
    assert spread_layers(8, 8) == set(range(8))
    assert all(len(spread_layers(40, number)) == number for number in range(41))


def test_weights_gradients_and_adam_by_zero_stage():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    assert weight_bytes(model, 0, 4) == (800, 400, 800)
    assert weight_bytes(model, 1, 4) == (800, 400, 200)
    assert weight_bytes(model, 2, 4) == (800, 100, 200)
    assert weight_bytes(model, 3, 4) == (200, 100, 200)
    # Half precision: 2 + 2 bytes, Adam's 8 and a float32 copy of 4.
    assert weight_bytes(model.to(torch.bfloat16), 0, 1) == (400, 200, 1200)


def test_loss_needs_one_chunk_of_logits_or_all_of_them(toy_model):
    model = toy_model()
    vocab_size = model.config.vocab_size
    assert loss_bytes(model, 10, 2) == 10 * vocab_size * 10 + 10 * 32 * 2
    assert loss_bytes(model, 10**9, 2) == 2**26 * 10 + 10**9 * 32 * 2
    model.get_output_embeddings().plain_paths = frozenset({"loss"})
    assert loss_bytes(model, 10, 2) == 10 * vocab_size * 2 * 6
    for plain, num_asked in (((), 10), (("loss",), 100)):
        set_plain_paths(model, plain)
        assert estimate_memory(model, run_args(), 100, 10).loss == loss_bytes(model, num_asked, 4)


@pytest.mark.parametrize(("packing", "num_tokens"), [("none", 2 * 9), ("samples", 9 + 5), ("tokens", 77)])
def test_longest_batch_is_padded_or_a_row(packing, num_tokens):
    args = SimpleNamespace(packing=packing, packing_tokens=77, per_device_train_batch_size=2, model_max_length=100)
    assert longest_batch(SimpleNamespace(lengths=np.array([5, 9, 2])), args) == num_tokens
    if packing != "tokens":
        assert longest_batch(SimpleNamespace(), args) == 200


def test_table_adds_up():
    lines = memory_lines(Memory(2**30, 2**30, 2**30, 2**29, 2**29))
    assert lines[-1].split() == ["total", "4.000", "GiB"]


def test_fewest_layers_that_fit_are_chosen():
    assert [
        fewest_checkpointed(4, lambda number: 100 - 10 * number, budget) for budget in (100, 99, 75, 61, 60, 5)
    ] == [
        0,
        1,
        3,
        4,
        4,
        4,
    ]


def test_free_memory_is_what_the_machine_or_its_container_has_left(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("8192\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 4096
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 4096 + 3000
    assert free_ram() > 2**20


def test_offload_is_read_from_the_config():
    cpu, none = {"device": "cpu"}, {"device": "none"}
    assert offloaded({}) == offloaded({"zero_optimization": {"offload_param": None}}) == set()
    assert offloaded({"zero_optimization": {"offload_optimizer": cpu, "offload_param": none}}) == {"optimizer"}
    assert offloaded({"zero_optimization": {"offload_optimizer": cpu, "offload_param": {"device": "nvme"}}}) == {
        "optimizer",
        "param",
    }


def test_offload_is_that_of_a_config_that_accelerate_gave():
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    args = {"deepspeed": None, "uses_deepspeed": True, "deepspeed_plugin": plugin}
    assert offload_of_run(SimpleNamespace(device=torch.device("cuda"), **args)) == {"optimizer"}
    assert offload_of_run(SimpleNamespace(device=torch.device("cpu"), **args)) == set()


def test_plan_of_a_run_leaves_out_what_is_off_the_device(toy_model):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    args = run_args(device=torch.device("cuda"), uses_deepspeed=True, deepspeed_plugin=plugin, max_steps=1)
    args.gradient_accumulation_steps = 1
    dataset = SimpleNamespace(lengths=np.array([100, 200]), layout=SimpleNamespace(is_anyres=False))
    lines = dict(line.split()[:2] for line in plan_of_run(toy_model(), dataset, args).splitlines()[2:])
    assert lines["optimizer"] == lines["gradients"] == "0.0"
    assert float(lines["weights"]) > 0


def test_loss_is_that_of_the_device_of_the_run(toy_model, room, caplog):
    room(100 * GIB)
    model, dataset = toy_model().train(), SimpleNamespace(lengths=np.array([10**6]))
    with caplog.at_level(logging.INFO, logger="llava_lite.train.memory"):
        choose_checkpointing(model, dataset, run_args(per_device_train_batch_size=1))
    weights = sum(p.numel() * 4 * 4 for p in model.parameters())
    needed = weights + activation_bytes(model, 10**6, 4) + loss_bytes(model, 10**6, 4, "cpu")
    assert f"{gib(needed)} of 100.00 GiB" in caplog.text


@pytest.fixture
def room(monkeypatch):
    """Return a function: bytes -> the device has so many to fill."""
    import llava_lite.train.memory as memory

    return lambda num_bytes: monkeypatch.setattr(memory, "usable_bytes", lambda *args: num_bytes)


def run_args(**more):
    """Return the arguments of a run that the choice reads."""
    base = {"packing": "none", "per_device_train_batch_size": 4, "model_max_length": 200, "uses_deepspeed": False}
    base |= {"device": torch.device("cpu"), "zero_stage": 0, "world_size": 1, "gradient_checkpointing": False}
    return SimpleNamespace(**base | {"bf16": False, "fp16": False} | more)


def test_choice_is_logged_with_its_sum_and_changes_no_gradient(toy_model, room, caplog):
    dataset, model = SimpleNamespace(lengths=np.array([100, 200])), toy_model().train()
    ids = torch.randint(3, 100, (1, 30))
    expected = gradients_of(model, ids)
    weights = sum(p.numel() * 4 * 4 for p in model.parameters())
    layer = 800 * layer_activation_bytes(model.model.layers[0], model.config, 4)
    of_loss = loss_bytes(model, 800, 4)
    for num_bytes, chosen in ((GIB, 0), (weights + of_loss + 3.6 * layer, 1), (weights + of_loss + 2.6 * layer, 2)):
        room(num_bytes)
        with caplog.at_level(logging.INFO, logger="llava_lite.train.memory"):
            assert choose_checkpointing(model, dataset, run_args()) == chosen
        assert f"{chosen} of 4 layers" in caplog.text
        assert [layer.gradient_checkpointing for layer in model.model.layers].count(True) == chosen
        assert all(ours.equal(theirs) for ours, theirs in zip(gradients_of(model, ids), expected, strict=True))
    caplog.clear()
    room(weights / 2)
    assert choose_checkpointing(model, dataset, run_args()) == 4
    assert "expect to run out of memory" in caplog.text


def gradients_of(model, ids):
    """Return the gradients of a loss over ids."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
