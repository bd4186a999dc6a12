"""What is made again for its gradient: the same gradients, less kept, and a checkpoint around it is heeded."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_lite.model import remade as remade_file
from llava_lite.model.remade import remade


def make(gate, up):
    return F.silu(gate) * up


def tensors():
    torch.manual_seed(0)
    return [torch.randn(5, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True), torch.nn.Linear(6, 4)]


def body(gate, up, layer, again=True):
    made = make(gate * 2, up)
    if not again:
        return layer(made)
    with remade(made, make, gate * 2, up):
        return layer(made)


def gradients(out, given):
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return [given[0].grad, given[1].grad, given[2].weight.grad, given[2].bias.grad]


@pytest.fixture
def expected():
    given = tensors()
    return gradients(body(*given, again=False), given)


def around(kind, given):
    if kind == "checkpoint":
        return checkpoint(body, *given, use_reentrant=False)
    if kind == "offload":
        with save_on_cpu():
            return body(*given)
    return body(*given)


@pytest.mark.parametrize("kind", ["alone", "checkpoint", "offload"])
def test_gradients_are_the_same(expected, kind):
    given = tensors()
    for mine, plain in zip(gradients(around(kind, given), given), expected, strict=True):
        assert torch.equal(mine, plain)


def test_inputs_are_kept_and_nothing_that_is_made():
    kept, given = [], tensors()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate, up = given[0] * 2, given[1] * 2
        kept.clear()
        made = make(gate.detach(), up.detach()).requires_grad_()
        with remade(made, make, gate, up):
            out = given[2](made[None])
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr(), given[2].weight.data_ptr()}
    out.sum().backward()
    assert torch.allclose(given[2].weight.grad, made.detach().sum(0).expand(4, 6))


def test_a_checkpoint_around_it_keeps_none_of_its_inputs():
    given, alive = tensors(), []

    def watched(gate, up, layer):
        inner = gate * 2
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(inner.untyped_storage()))
        made = make(inner, up)
        with remade(made, make, inner, up):
            return layer(made)

    out = checkpoint(watched, *given, use_reentrant=False)
    assert alive[0].expired()
    out.sum().backward()


def test_a_second_backward_pass_makes_it_once_more(expected):
    given = tensors()
    out = body(*given)
    weighed = (out * torch.arange(out.numel()).view_as(out)).sum()
    weighed.backward(retain_graph=True)
    weighed.backward()
    assert torch.allclose(given[2].weight.grad, 2 * expected[2])


@pytest.mark.parametrize("without", ["gradients", "the private function"])
def test_without_what_it_needs_nothing_changes(monkeypatch, expected, without):
    given = tensors()
    if without == "gradients":
        with torch.no_grad():
            assert not body(*given).requires_grad
        return
    monkeypatch.setattr(remade_file, "_hooks_around", None)
    assert torch.equal(gradients(body(*given), given)[0], expected[0])


def test_a_layer_that_keeps_its_own_output_is_freed_without_a_backward_pass():
    given = tensors()
    made = make(given[0] * 2, given[1])
    with remade(made, make, given[0] * 2, given[1]):
        out = given[2](made).exp()
    alive = torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage())
    del out, made
    assert alive.expired()
