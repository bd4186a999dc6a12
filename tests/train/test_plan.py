"""The estimate of a run's memory, against hand-computed sums and against what autograd really keeps."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.model import model_class_for
from llava_lite.train.plan import (
    Memory,
    activation_bytes,
    layer_activation_bytes,
    logits_bytes,
    longest_batch,
    main,
    memory_lines,
    steps_of_run,
    weight_bytes,
)

NUM_TOKENS = 48


def bytes_kept(model, dtype):
    """Return the bytes that the decoder keeps for its backward pass, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    embeds = torch.randn(1, NUM_TOKENS, model.config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(inputs_embeds=embeds, attention_mask=torch.ones(1, NUM_TOKENS, dtype=torch.long))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "top_k"), [("llama", 0), ("phi", 0), ("qwen2", 0), ("stablelm", 0), ("llama", 2), ("phi", 1)]
)
def test_activations_are_what_autograd_keeps(model_type, top_k, dtype, trains):
    model_class = model_class_for(model_type)
    moe = {"moe_mode": "dense", "num_experts": [4], "top_k_experts": top_k} if top_k else None
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = model_class.config_class(vocab_size=20, num_key_value_heads=4, moe=moe, **shape)
    model = model_class(config).to(dtype).train()
    model.requires_grad_(trains)
    estimate = activation_bytes(model, NUM_TOKENS, dtype.itemsize, checkpointing=False)
    # Not in the formula: routing tables, the last norm, angles of the positions.
    assert estimate == pytest.approx(bytes_kept(model, dtype), rel=0.12)


def test_a_layer_of_the_toys_keeps_what_the_formula_says(toy_model):
    model = toy_model()
    layer, config = model.model.layers[0], model.config
    # 4 bytes x (8 x 32 + 4 x 64 + 2 x 16) for float32, trained.
    assert layer_activation_bytes(layer, config, 4) == 4 * (8 * 32 + 4 * 64 + 2 * 16)
    layer.requires_grad_(False)
    assert layer_activation_bytes(layer, config, 2) == 2 * ((4 + 2) * 32 + 3 * 64 + 2 * 16)


def test_checkpointing_keeps_inputs_and_one_layer(toy_model):
    model = toy_model()
    layer = layer_activation_bytes(model.model.layers[0], model.config, 4)
    assert activation_bytes(model, 10, 4, checkpointing=True) == 10 * (layer + 4 * 4 * 32)


def test_weights_gradients_and_adam_by_zero_stage():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    assert weight_bytes(model, 0, 4) == (800, 400, 800)
    assert weight_bytes(model, 1, 4) == (800, 400, 200)
    assert weight_bytes(model, 2, 4) == (800, 100, 200)
    assert weight_bytes(model, 3, 4) == (200, 100, 200)
    # Half precision: 2 + 2 bytes, Adam's 8 and a float32 copy of 4.
    assert weight_bytes(model.to(torch.bfloat16), 0, 1) == (400, 200, 1200)


def test_logits_longest_batch_and_steps():
    assert logits_bytes(SimpleNamespace(vocab_size=10), 3, 2) == 3 * 10 * 2 * 6
    assert longest_batch([5, 9, 2], 4) == 36
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2.0)
    assert steps_of_run(10, 4, args) == 6
    args.max_steps = 5
    assert steps_of_run(10, 4, args) == 5


def test_table_adds_up():
    lines = memory_lines(Memory(2**30, 2**30, 2**30, 2**29, 2**29))
    assert lines[-1].split() == ["total", "4.000", "GiB"]


@pytest.mark.parametrize("stage", ["projector", "moe", "lora"])
def test_command_plans_from_configs_alone(stage, stage_flags, tmp_path, capsys):
    main([*stage_flags(stage, tmp_path / "out"), "--num_devices", "8"])
    out = capsys.readouterr().out
    assert "mm_projector" in out
    assert "8 devices, ZeRO-0, 8,192 tokens in a micro-batch (4 records of 2048, all learned)" in out
    assert "total" in out
    assert not (tmp_path / "out").exists()
