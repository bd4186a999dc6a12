"""The memory of a step, by hand and by what autograd keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_lite.model import model_class_for
from llava_lite.model.plain_paths import set_plain_paths
from llava_lite.train.estimate.checkpointing import (
    checkpoint_layers,
)
from llava_lite.train.estimate.memory import (
    Memory,
    activation_bytes,
    estimate_memory,
    get_offload,
    longest_batch,
    loss_bytes,
    memory_lines,
    offloaded,
    spread_layers,
    weight_bytes,
)
from llava_lite.train.estimate.plan import plan_run

NUM_TOKENS = 48
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}


def small_model(model_type, top_k=0, **more):
    """Return a decoder without a tower."""
    model_class = model_class_for(model_type)
    moe = {"moe_mode": "dense", "num_experts": [4], "top_k_experts": top_k} if top_k else None
    config = model_class.config_class(vocab_size=20, num_key_value_heads=4, moe=moe, **SHAPE, **more)
    return model_class(config).train()


def packed_row():
    """Return two samples packed into one sequence, as a collator describes them."""
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


BACKBONES_AND_EXPERTS = [
    *(("llama", 0), ("phi", 0), ("qwen2", 0), ("qwen3", 0), ("stablelm", 0)),
    *(("llama", 2), ("phi", 1)),
]


@pytest.mark.parametrize(
    ("dtype", "trains", "is_packed"),
    [(torch.bfloat16, True, True), (torch.float32, True, False), (torch.bfloat16, False, False)],
)
@pytest.mark.parametrize(("model_type", "top_k"), BACKBONES_AND_EXPERTS)
def test_estimated_activations_are_within_a_fifth_of_what_a_forward_pass_keeps(
    model_type, top_k, dtype, trains, is_packed
):
    model = small_model(model_type, top_k, **({"head_dim": 32} if model_type == "qwen3" else {})).to(dtype)
    model.requires_grad_(trains)
    model.set_attn_implementation("varlen" if is_packed else "sdpa")
    batch = packed_row() if is_packed else {"attention_mask": torch.ones(1, NUM_TOKENS, dtype=torch.long)}
    # Not in the estimate: routing tables, the last norm, angles of the positions; and libraries change what they keep.
    estimate = activation_bytes(model, NUM_TOKENS, dtype.itemsize)
    assert estimate == pytest.approx(bytes_kept(model, dtype, **batch), rel=0.2)


def test_each_checkpointed_layer_makes_the_estimate_and_the_need_smaller():
    model = small_model("llama")
    batch = {"attention_mask": torch.ones(1, NUM_TOKENS, dtype=torch.long)}
    kept, estimates = [], []
    for number in (0, 1, 2):
        checkpoint_layers(model, spread_layers(3, number))
        kept.append(bytes_kept(model, torch.float32, **batch))
        estimates.append(activation_bytes(model, NUM_TOKENS, 4, number))
    assert estimates == pytest.approx(kept, rel=0.2)
    assert estimates == sorted(estimates, reverse=True)
    # With all of them checkpointed one is recomputed, so all its tensors exist as where it is not; and its input.
    one_input = NUM_TOKENS * 4 * SHAPE["hidden_size"]
    assert activation_bytes(model, NUM_TOKENS, 4, 3) == estimates[2] + one_input


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
    assert get_offload(SimpleNamespace(device=torch.device("cuda"), **args)) == {"optimizer"}
    assert get_offload(SimpleNamespace(device=torch.device("cpu"), **args)) == set()


def run_args(**more):
    """Return the arguments of a run that the decision reads."""
    base = {"packing": "none", "per_device_train_batch_size": 4, "model_max_length": 200, "uses_deepspeed": False}
    base |= {"device": torch.device("cpu"), "zero_stage": 0, "world_size": 1, "gradient_checkpointing": False}
    return SimpleNamespace(**base | {"bf16": False, "fp16": False} | more)


def test_plan_of_a_run_leaves_out_what_is_off_the_device(toy_model):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    args = run_args(device=torch.device("cuda"), uses_deepspeed=True, deepspeed_plugin=plugin, max_steps=1)
    args.gradient_accumulation_steps = 1
    dataset = SimpleNamespace(lengths=np.array([100, 200]), layout=SimpleNamespace(is_anyres=False))
    lines = dict(line.split()[:2] for line in plan_run(toy_model(), dataset, args).splitlines()[2:])
    assert lines["optimizer"] == lines["gradients"] == "0.0"
    assert float(lines["weights"]) > 0
