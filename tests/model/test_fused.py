"""Fused steps of a layer against the modules of transformers that they stand for."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llava_lite.model import fused

B, L, H, DH, D = 2, 7, 4, 16, 64


def run(function, tensors, trained=None):
    """Return outputs and gradients of `function` at copies of the tensors, of which those named train."""
    trained = range(len(tensors)) if trained is None else trained
    copies = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    outputs = function(*copies)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, weights)
    return [out.detach() for out in outputs], [copy.grad for copy in copies]


def assert_same(ours, theirs, atol):
    assert [None if t is None else (t.dtype, t.shape) for t in ours] == [
        None if t is None else (t.dtype, t.shape) for t in theirs
    ]
    for mine, stock in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.float(), stock.float(), atol=atol, rtol=atol)


def stock_norm(inputs, weight):
    norm = LlamaRMSNorm(D, eps=1e-5)
    del norm.weight
    norm.weight = weight
    return norm(inputs)


# Half precision: one unit in the last place of numbers up to 8, of which the stock gradient sums some.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,)])
def test_norm_is_that_of_transformers(dtype, weight_dtype, trained):
    torch.manual_seed(0)
    tensors = [torch.randn(B, L, D).to(dtype), (1 + torch.randn(D) / 4).to(weight_dtype or dtype)]
    ours = run(lambda x, w: fused.rms_norm(x, w, 1e-5), tensors, trained)
    theirs = run(stock_norm, tensors, trained)
    # Forward by the same casts: the same numbers but for the order of one float32 sum.
    assert_same(ours[0], theirs[0], 1e-6 if dtype == torch.float32 else 2**-7 * 4)
    assert_same(ours[1], theirs[1], TOLERANCE[dtype] * 5)


def test_on_cuda_without_liger_torchs_own_norm_gives_the_same(monkeypatch):
    inputs, weight = torch.randn(B, L, D), 1 + torch.randn(D) / 4
    assert not fused.has_kernel(inputs, weight)
    assert fused.has_kernel(types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32), weight)
    monkeypatch.setattr(fused, "has_kernel", lambda *pair: True)
    ours = run(lambda x, w: fused.rms_norm(x, w, 1e-5), [inputs, weight])
    theirs = run(stock_norm, [inputs, weight])
    assert_same([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], 5e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gate_is_silu_times_up(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(B, L, D).to(dtype) for _ in range(2)]
    ours = run(fused.swiglu, tensors)
    theirs = run(lambda gate, up: F.silu(gate) * up, tensors)
    assert_same(ours[0], theirs[0], 0)
    assert_same(ours[1], theirs[1], TOLERANCE[dtype])


def test_gate_of_two_dtypes_is_promoted_as_torch_does():
    gate, up = torch.randn(3, 4).bfloat16(), torch.randn(3, 4)
    assert torch.equal(fused.swiglu(gate, up), F.silu(gate) * up)


def angles(turning, batch=1, dtype=torch.float32):
    """Return cos and sin [batch, L, turning], both halves alike."""
    turns = torch.randn(batch, L, turning // 2)
    turns = torch.cat([turns, turns], dim=-1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def stock_rotation(query, key, cos, sin):
    """Turn as transformers does, the first dimensions of a head only where cos is narrower, as Phi does."""
    turning = cos.shape[-1]
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    turned = apply_rotary_pos_emb(query[..., :turning], key[..., :turning], cos, sin)
    whole = (torch.cat([t, s[..., turning:]], dim=-1) for t, s in zip(turned, (query, key), strict=True))
    return tuple(t.transpose(1, 2) for t in whole)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("turning", [DH, DH // 2])
@pytest.mark.parametrize("batch", [1, B])
def test_rotation_is_that_of_transformers(dtype, turning, batch):
    torch.manual_seed(0)
    cos, sin = angles(turning, batch, dtype)
    tensors = [torch.randn(B, L, H, DH).to(dtype), torch.randn(B, L, H // 2, DH).to(dtype)]
    ours = run(lambda q, k: fused.rotate(q, k, cos, sin), tensors)
    theirs = run(lambda q, k: stock_rotation(q, k, cos, sin), tensors)
    assert_same([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], TOLERANCE[dtype])


def test_rotation_by_wider_angles_is_rounded_once_to_what_came():
    # Under autocast positions are float32 and projections bfloat16; attention would cast back.
    torch.manual_seed(0)
    cos, sin = angles(DH)
    tensors = [torch.randn(B, L, H, DH).bfloat16(), torch.randn(B, L, H, DH).bfloat16()]
    ours = run(lambda q, k: fused.rotate(q, k, cos, sin), tensors)
    theirs = run(lambda q, k: tuple(t.bfloat16() for t in stock_rotation(q, k, cos, sin)), tensors)
    assert_same([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], TOLERANCE[torch.bfloat16])


def test_rotation_leaves_what_it_is_given():
    cos, sin = angles(DH)
    query = torch.randn(1, L, H, DH)
    before = query.clone()
    fused.rotate(query, query, cos, sin)
    assert torch.equal(query, before)


def saved_bytes(function, *tensors):
    """Return the bytes that the graph of a call keeps, each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*tensors)
    return sum(kept.values()), out


def test_norm_keeps_its_input_and_one_number_a_row():
    inputs, weight = torch.randn(L, D, requires_grad=True), nn.Parameter(torch.ones(D))
    ours, _ = saved_bytes(lambda x, w: fused.rms_norm(x, w, 1e-5), inputs, weight)
    theirs, _ = saved_bytes(stock_norm, inputs, weight)
    assert ours == 4 * (L * D + D + L)
    assert theirs >= ours + 4 * L * D


def test_gate_keeps_two_of_three():
    tensors = [torch.randn(L, D, requires_grad=True) for _ in range(2)]
    assert saved_bytes(fused.swiglu, *tensors)[0] == 2 * 4 * L * D
    assert saved_bytes(lambda gate, up: F.silu(gate) * up, *tensors)[0] == 3 * 4 * L * D


@pytest.mark.parametrize("name", ["norm", "gate", "rotation"])
def test_second_derivative_is_refused(name):
    states = torch.randn(1, L, H, DH, requires_grad=True)
    out = {
        "norm": lambda: fused.rms_norm(states, torch.ones(DH), 1e-5),
        "gate": lambda: fused.swiglu(states, states),
        "rotation": lambda: fused.rotate(states, states, *angles(DH))[0],
    }[name]()
    (grad,) = torch.autograd.grad(out.square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_on_cuda_liger_is_taken_where_it_is_installed(monkeypatch):
    calls = []
    module = types.ModuleType("liger_kernel.transformers.functional")
    for name in ("liger_rms_norm", "liger_swiglu", "liger_rope"):
        setattr(module, name, lambda *args, name=name: calls.append((name, args)) or (args[0], args[1]))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers"].functional = module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())
    fused._liger.cache_clear()
    try:
        assert fused.liger_for(torch.device("cpu")) is None
        assert fused.liger_for(torch.device("cuda")) is not None
        monkeypatch.setattr(fused, "liger_for", lambda device: fused._liger())
        states, weight = torch.randn(1, L, H, DH), torch.ones(DH)
        cos, sin = angles(DH)
        fused.rms_norm(states, weight, 1e-5)
        fused.swiglu(states, states)
        query, _ = fused.rotate(states, states, cos, sin)
        assert query.shape == states.shape
        partial, _ = fused.rotate(states, states, *angles(DH // 2))
    finally:
        fused._liger.cache_clear()
    assert [name for name, _ in calls] == ["liger_rms_norm", "liger_swiglu", "liger_rope"]
    assert calls[0][1][2:] == (1e-5, 0.0, "llama", False)
    # Liger wants heads before positions, and turns whole heads only.
    assert calls[2][1][0].shape == (1, H, L, DH)
    assert not torch.equal(partial, states)
