"""The loss of a vocabulary head against torch's own cross-entropy of full logits."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llava_lite.model import lm_head as vocabulary_head
from llava_lite.model.lm_head import VocabularyHead
from llava_lite.model.matmul import TORCH
from llava_lite.model.plain_paths import set_plain_paths

S, D, V = 23, 16, 50


def run(head, hidden, labels, divisor, full):
    """Return loss and gradients, by the head itself or by torch's functions on all logits."""
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    if full:
        logits = F.linear(hidden, head.weight, head.bias).float()
        loss = F.cross_entropy(logits, labels, reduction="sum") / divisor
    else:
        loss = head(hidden, labels=labels, divisor=divisor)
    (loss * 3).backward()
    return [loss.detach(), hidden.grad, *(param.grad for param in head.parameters() if param.requires_grad)]


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(S, D), torch.randint(V, (S,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_logits", [V, 4 * V, 2**24])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("divisor", [1, 7, torch.tensor(7)])
def test_loss_and_gradients_are_those_of_full_logits(case, monkeypatch, bias, chunk_logits, trains, divisor):
    monkeypatch.setitem(vocabulary_head.CHUNK_LOGITS, "cpu", chunk_logits)
    head = VocabularyHead(D, V, bias=bias).requires_grad_(trains)
    for ours, theirs in zip(run(head, *case, divisor, False), run(head, *case, divisor, True), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-5)


def test_logits_of_one_chunk_at_most_exist(case, monkeypatch):
    monkeypatch.setitem(vocabulary_head.CHUNK_LOGITS, "cpu", 5 * V)
    shapes, kept = [], []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shapes.extend([tuple(result.shape)] if isinstance(result, torch.Tensor) else [])
            return result

    head = VocabularyHead(D, V)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t), Watch():
        head(case[0].requires_grad_(), labels=case[1]).backward()
    # D rows has the weight, transposed.
    num_positions = [shape[0] for shape in shapes if shape[1:] == (V,) and shape[0] != D]
    assert num_positions
    assert max(num_positions) <= 5
    assert (S, V) not in kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_torch(case, monkeypatch, dtype):
    hidden, labels = case
    head = VocabularyHead(D, V, bias=False)
    truth = run(head, hidden, labels, 9, True)
    half = VocabularyHead(D, V, bias=False).to(dtype)
    half.load_state_dict(head.state_dict())
    monkeypatch.setitem(vocabulary_head.CHUNK_LOGITS, "cpu", 5 * V)
    results = [run(half, hidden.to(dtype), labels, 9, full) for full in (False, True)]
    assert [r.dtype for r in results[0]] == [r.dtype for r in results[1]]
    for ours, theirs, true in zip(*results, truth, strict=True):
        error, torch_error = (float((r.float() - true).abs().max()) for r in (ours, theirs))
        assert error <= 2 * torch_error + 1e-6


def test_autocast_computes_in_half_and_keeps_gradients_in_float32(case):
    head = VocabularyHead(D, V)
    with torch.autocast("cpu", torch.bfloat16):
        results = [run(head, *case, 9, full) for full in (False, True)]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.allclose(ours, theirs, atol=3e-2, rtol=3e-2)


def test_no_supervised_position_leaves_zero_gradients_in_the_graph():
    head = VocabularyHead(D, V)
    hidden = torch.zeros(0, D, requires_grad=True)
    loss = head(hidden, labels=torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not head.weight.grad.any()


def test_without_gradient_nothing_is_kept(case):
    head = VocabularyHead(D, V)
    with torch.no_grad():
        loss = head(case[0], labels=case[1])
    assert not loss.requires_grad
    assert torch.allclose(loss, F.cross_entropy(head(case[0]), case[1], reduction="sum"), rtol=1e-6)


def test_a_graph_that_is_kept_gives_the_same_gradient_twice(case):
    head = VocabularyHead(D, V)
    loss = head(case[0], labels=case[1], divisor=5) * 2
    first, second = (torch.autograd.grad(loss, head.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_on_cuda_liger_is_taken_where_it_is_installed(case, monkeypatch):
    calls = []
    module = types.ModuleType("liger_kernel.transformers.functional")

    def fused(input, weight, target, bias, reduction):
        calls.append(reduction)
        return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)

    module.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vocabulary_head.importlib.util, "find_spec", lambda name: object())
    assert vocabulary_head.find_liger(case[0]) is None
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"))
    assert vocabulary_head.find_liger(on_cuda) is fused
    monkeypatch.setattr(vocabulary_head, "find_liger", lambda hidden: fused)
    head = VocabularyHead(D, V)
    loss = head(case[0], labels=case[1], divisor=4)
    assert calls == ["sum"]
    assert torch.allclose(loss, F.cross_entropy(head(case[0]), case[1], reduction="sum") / 4)
    head.plain_paths = frozenset({"liger"})
    assert torch.allclose(head(case[0], labels=case[1], divisor=4), loss)
    assert calls == ["sum"]


def test_the_plain_path_gives_the_same_numbers(case):
    head = VocabularyHead(D, V)
    fused = run(head, *case, 9, False)
    head.plain_paths = frozenset({"loss"})
    for ours, plain in zip(fused, run(head, *case, 9, False), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6, rtol=1e-5)


def test_a_resized_model_keeps_a_head_that_returns_its_loss(toy_model):
    model = toy_model()
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    assert type(model.lm_head) is VocabularyHead
    # It multiplies as the head that it replaces, and holds the parameters that it was given.
    set_plain_paths(model, ["loss"])
    model.lm_head.fast_matmul = replace(TORCH)
    given = nn.Linear(4, 5)
    model.set_output_embeddings(given)
    assert type(model.lm_head) is VocabularyHead
    assert model.lm_head.matmul is not TORCH
    assert model.lm_head.plain_paths == {"loss"}
    assert model.lm_head.weight is given.weight
    assert model.lm_head.bias is given.bias
