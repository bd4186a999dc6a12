"""The faster matmul is as exact as F.linear, measured against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava_lite.model.fast import matmul as fast_matmul
from llava_lite.model.fast.matmul import linear, product, split_into_pieces, takes_onednn, weight_gradient
from llava_lite.model.matmul import TORCH
from llava_lite.model.plain_paths import set_plain_paths

SIZES = [(0, 3, 5), (9, 0, 5), (1, 3, 5), (7, 16, 4), (9, 31, 65), (29, 64, 96), (16, 64, 96)]


@pytest.fixture(params=["onednn", "blas"])
def library(request, monkeypatch):
    """Run a test with oneDNN, or torch's matmul in its place where this machine lacks it, and without."""
    if request.param == "onednn" and not takes_onednn(torch.ones(1)):
        # This processor gains nothing by it; pieces, parts and padding are the same with any matmul.
        monkeypatch.setattr(fast_matmul, "takes_onednn", lambda *given: all(t.dtype == torch.float32 for t in given))
        monkeypatch.setattr(fast_matmul, "_onednn", F.linear)
    for name, value in {"LEAST_WORK": 0, "LEAST_WEIGHT": 0, "PIECES": (16, 8), "MOST_NUMBERS": 600}.items():
        monkeypatch.setattr(fast_matmul, name, value)
    with torch.backends.mkldnn.flags(enabled=request.param == "onednn"):
        yield request.param


def matrices(views, *shapes):
    """Return matrices of these shapes: contiguous, or views of larger ones."""
    torch.manual_seed(0)
    if views == "transposed":
        return [torch.randn(columns, rows).t() for rows, columns in shapes]
    if views == "sliced":
        return [torch.randn(rows + 3, 2 * columns)[2:-1, columns:] for rows, columns in shapes]
    return [torch.randn(rows, columns) for rows, columns in shapes]


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("views", ["contiguous", "transposed", "sliced"])
def test_a_matmul_of_any_views_is_that_of_float64(library, rows, inner, columns, views, biased):
    left, right = matrices(views, (rows, inner), (columns, inner))
    bias = torch.randn(columns) if biased else None
    out = product(left, right, bias)
    assert out.dtype == torch.float32
    expected = left.double() @ right.double().t() + (bias.double() if biased else 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("views", ["contiguous", "transposed", "sliced"])
def test_a_gradient_of_weights_of_any_views_is_that_of_float64(library, rows, inner, columns, views):
    grad, given = matrices(views, (rows, columns), (rows, inner))
    out = weight_gradient(grad, given)
    torch.testing.assert_close(out.double(), grad.double().t() @ given.double(), rtol=1e-5, atol=1e-5)
    into = torch.full((2, columns, inner), float("nan"))[1]
    assert weight_gradient(grad, given, out=into).data_ptr() == into.data_ptr()
    # BLAS adds in another order where memory is aligned otherwise.
    torch.testing.assert_close(into, out, rtol=1e-5, atol=1e-5)


def test_pieces_cover_every_token_once_and_the_last_alone_is_filled_up():
    for count in (0, 1, 63, 64, 65, 1024, 1878, 5000):
        pieces = split_into_pieces(count, fast_matmul.PIECES)
        assert [i for piece, _ in pieces for i in range(count)[piece]] == list(range(count))
        assert all(size in fast_matmul.PIECES for _, size in pieces)
        assert all(piece.stop - piece.start == size for piece, size in pieces[:-1])
        assert all(piece.stop > piece.start for piece, _ in pieces)
    assert [size for _, size in split_into_pieces(151, fast_matmul.PIECES)] == [192]
    assert [size for _, size in split_into_pieces(303, fast_matmul.PIECES)] == [192, 128]
    assert [size for _, size in split_into_pieces(5000, fast_matmul.PIECES)] == [1024] * 4 + [768, 192]


@pytest.mark.parametrize("views", [("sliced", "contiguous"), ("transposed", "sliced")])
def test_numbers_that_lie_apart_are_gathered_first(library, monkeypatch, views):
    # oneDNN would take a way that is hundreds of times as slow.
    hf = torch.ops.mkldnn._linear_pointwise

    def watch(left, right, *more):
        assert right.is_contiguous() or right.t().is_contiguous()
        return hf(left, right, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watch)
    for kind in views:
        left, right = matrices(kind, (29, 31), (65, 31))
        product(left, right)
        product(left, right[:, ::2].repeat_interleave(2, dim=1)[:, :31])
        weight_gradient(left, left)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(dtype):
    left, right = torch.randn(9, 4).to(dtype), torch.randn(3, 4).to(dtype)
    assert not takes_onednn(left, right)
    assert torch.equal(product(left, right), left @ right.t())
    assert torch.equal(weight_gradient(left, left), left.t() @ left)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (1, 2, 16), (4, 1, 16), (7, 1, 16), (3, 5, 16), (1, 29, 16), (16,), (0, 16)]
)
def test_without_gradients_a_linear_layer_of_any_batch_is_that_of_float64(library, biased, shape):
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(*shape), torch.randn(12, 16), torch.randn(12) if biased else None
    with torch.no_grad():
        out = linear(inputs, weight, bias)
    expected = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == expected.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 16), (24, 16), (16,), (0, 16), (2, 0, 16)])
def test_a_linear_layer_has_the_outputs_and_gradients_of_torchs(library, biased, shape):
    torch.manual_seed(0)
    given = [torch.randn(*shape), torch.randn(12, 16), torch.randn(12) if biased else None]
    results = []
    for layer in (linear, F.linear):
        inputs, weight, bias = (None if t is None else t.clone().requires_grad_() for t in given)
        out = layer(inputs, weight, bias)
        out.square().sum().backward()
        results.append([out, inputs.grad, weight.grad, *([bias.grad] if biased else [])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input(library):
    inputs, weight = torch.randn(8, 16, requires_grad=True), torch.randn(12, 16)
    out = linear(inputs, weight)
    kept = out.grad_fn.next_functions[0][0].saved_tensors if library == "onednn" else ()
    assert all(saved is None or saved.shape == weight.shape for saved in kept)
    out.sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(8, -1), rtol=1e-5, atol=1e-5)


def test_autocast_is_obeyed(library):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.ones(8, 4), torch.ones(2, 4)).dtype == torch.bfloat16


@pytest.fixture
def installed(monkeypatch):
    """Let `install` do its work on any processor."""
    monkeypatch.setattr(fast_matmul, "has_wide_vectors", lambda: True)


def linear_layers(model):
    """Return the layers that are torch's linear layer or a subclass, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_a_loaded_model_multiplies_by_it_with_the_same_names_ties_and_modes(installed, toy_model):
    from peft import LoraConfig, get_peft_model

    model = toy_model()
    layers = linear_layers(model)
    assert {type(layer) for name, layer in layers.items() if name != "lm_head"} == {fast_matmul.Linear}
    assert model.lm_head.matmul is fast_matmul.ONEDNN
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1" in layers
    assert not any(layer.training for layer in layers.values())
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert "layers.0.self_attn.q_proj.lora_A" in str(list(adapted.state_dict()))


def test_replaced_layers_hold_the_very_parameters(installed):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4, bias=False)), nn.Dropout())
    model[1].eval()
    before = dict(model.named_parameters())
    fast_matmul.install(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(param is before[name] for name, param in model.named_parameters())
    assert [type(layer) for layer in (model[0], model[1][0])] == [fast_matmul.Linear] * 2
    assert model[0].training
    assert not model[1][0].training


def test_a_model_that_is_initialised_again_keeps_the_weights_of_replaced_layers(installed, toy_model):
    model = toy_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.post_init()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_layers_of_other_classes_dtypes_and_devices_stay(installed):
    class FewBits(nn.Linear):
        pass

    hooked = nn.Linear(3, 4)
    hooked.forward = hooked.forward
    kept = [FewBits(3, 4), nn.Linear(3, 4).bfloat16(), nn.Linear(3, 4, device="meta"), hooked]
    model = nn.ModuleList(kept)
    fast_matmul.install(model)
    assert all(layer is old for layer, old in zip(model, kept, strict=True))


def test_a_processor_that_gains_nothing_keeps_torchs_layers(monkeypatch, toy_model):
    monkeypatch.setattr(fast_matmul, "has_wide_vectors", lambda: False)
    model = toy_model(moe={"num_experts": [2]})
    assert not any(isinstance(layer, fast_matmul.Linear) for layer in model.modules())
    assert model.lm_head.matmul is TORCH


def test_the_plain_path_is_torchs_own_matmul(installed, toy_model, monkeypatch):
    model = toy_model(moe={"num_experts": [2]})
    ids = torch.randint(3, 100, (1, 80), generator=torch.Generator().manual_seed(0))
    calls = []
    hf = fast_matmul.takes_onednn
    monkeypatch.setattr(fast_matmul, "takes_onednn", lambda *given: calls.append(1) or hf(*given))
    for names in ((), ("matmul",)):
        calls.clear()
        set_plain_paths(model, names)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert bool(calls) == (not names)


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_a_second_derivative_is_refused_and_not_silently_nothing(library):
    inputs, weight = torch.randn(16, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(inputs, weight).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
