"""Liger's layers stand in a decoder's places with its parameters; on CUDA they compute what transformers' do."""

import copy
import importlib.util
import logging
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from llava_lite.model.fast import install_liger
from llava_lite.model.plain_paths import install_training_kernels, set_plain_paths

MOE = {"moe_mode": "sparse", "num_experts": [2]}


@pytest.fixture
def stand_in(monkeypatch):
    """Put a package with Liger's names in place of liger-kernel, whose kernels run on CUDA only."""

    class LigerRMSNorm(nn.Module):
        def __init__(self, hidden_size, eps):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

        def forward(self, hidden):
            return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)

    class LigerSwiGLUMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(self, name, nn.Linear(config.hidden_size, config.intermediate_size, bias=False))

        def forward(self, hidden):
            return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    for name in ("liger_kernel", "liger_kernel.transformers"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.LigerRMSNorm, module.LigerSwiGLUMLP = LigerRMSNorm, LigerSwiGLUMLP
        monkeypatch.setitem(sys.modules, name, module)
    return LigerRMSNorm, LigerSwiGLUMLP


def results(model, ids):
    """Return the loss and the gradients of a training step."""
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "num_norms", "num_mlps"),
    # Qwen3 has two norms more in each of its four layers; StableLM's norms are LayerNorms; Phi's MLP has no gate.
    [("llama", 9, 4), ("mistral", 9, 4), ("qwen2", 9, 4), ("qwen3", 17, 4), ("stablelm", 0, 4), ("phi", 0, 0)],
)
def test_norms_and_gated_mlps_are_replaced_with_the_very_parameters(
    model_type, num_norms, num_mlps, stand_in, toy_model, caplog
):
    norm, mlp = stand_in
    model = toy_model(model_type)
    plain, before = copy.deepcopy(model), dict(model.named_parameters())
    with caplog.at_level(logging.INFO, logger="llava_lite"):
        install_liger(model)
    assert sum(type(module) is norm for module in model.modules()) == num_norms
    assert sum(type(module) is mlp for module in model.modules()) == num_mlps
    assert ("liger-kernel:" in caplog.text) == bool(num_norms + num_mlps)
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(after[name] is param for name, param in before.items())
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(results(model, ids), results(plain, ids), rtol=1e-4, atol=1e-5)


def test_experts_and_transformers_own_classes_stay(stand_in, toy_model):
    _, mlp = stand_in
    hf = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.apply_rotary_pos_emb
    model = toy_model(moe=MOE)
    install_liger(model)
    assert sorted(model.moe_layers()) == [0, 2]
    assert [type(layer.mlp) is mlp for layer in model.model.layers] == [False, True, False, True]
    assert hf == (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.apply_rotary_pos_emb)


@pytest.mark.parametrize(
    ("device", "plain", "replaces"), [("cuda", (), True), ("cuda", ("liger",), False), ("cpu", (), False)]
)
def test_training_on_cuda_installs_it_unless_the_plain_path_is_named(device, plain, replaces, stand_in, toy_model):
    norm, _ = stand_in
    model = toy_model()
    set_plain_paths(model, plain)
    install_training_kernels(model, torch.device(device))
    assert any(type(module) is norm for module in model.modules()) == replaces


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_without_liger_nothing_is_replaced(toy_model):
    model = toy_model()
    before = list(model.modules())
    install_training_kernels(model, torch.device("cuda"))
    assert list(model.modules()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "stablelm"])
def test_on_cuda_loss_and_gradients_are_those_of_transformers_layers(model_type, toy_model):
    pytest.importorskip("liger_kernel")
    model = toy_model(model_type).cuda()
    plain = copy.deepcopy(model)
    # The head's loss by torch in both, so that only the layers differ.
    set_plain_paths(model, ["loss"])
    set_plain_paths(plain, ["loss"])
    install_liger(model)
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    # Sums of at most 64 terms in float32, in another order, through four layers.
    torch.testing.assert_close(results(model, ids), results(plain, ids), rtol=1e-3, atol=1e-4)
