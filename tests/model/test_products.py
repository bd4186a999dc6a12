"""The faster product is the product: float64 is the truth, F.linear the rival."""

import copy

import pytest
import torch
from torch.nn import functional as F

from llava_lite.model import products
from llava_lite.model.products import linear, product, takes_onednn

SIZES = [(0, 3, 5), (9, 0, 5), (1, 3, 5), (7, 16, 4), (9, 31, 65), (128, 64, 96)]


@pytest.fixture(params=["onednn", "blas"])
def library(request, monkeypatch):
    """Run a test with oneDNN, where this machine has what it takes, and without."""
    if request.param == "onednn" and not takes_onednn(torch.ones(1)):
        pytest.skip("this processor has no 512-bit vectors, or torch no oneDNN")
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    with torch.backends.mkldnn.flags(enabled=request.param == "onednn"):
        yield request.param


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(0, 3, 5), (9, 0, 5), (1, 3, 5), (7, 16, 4), (9, 31, 65), (128, 64, 96)]
)
@pytest.mark.parametrize("views", ["whole", "transposed", "sliced"])
def test_a_product_of_any_views_is_that_of_float64(library, rows, inner, columns, views):
    torch.manual_seed(0)
    if views == "transposed":
        left, right = torch.randn(inner, rows).t(), torch.randn(inner, columns).t()
    elif views == "sliced":
        left, right = torch.randn(rows + 3, 2 * inner)[2:-1, inner:], torch.randn(3, columns, inner)[1]
    else:
        left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    out = product(left, right)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), left.double() @ right.double().t(), rtol=1e-5, atol=1e-5)
    into = torch.full((2, rows, columns), float("nan"))[1]
    assert product(left, right, out=into).data_ptr() == into.data_ptr()
    # BLAS adds in another order where memory is aligned otherwise.
    torch.testing.assert_close(into, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(dtype):
    left, right = torch.randn(9, 4).to(dtype), torch.randn(3, 4).to(dtype)
    assert not takes_onednn(left, right)
    assert torch.equal(product(left, right), left @ right.t())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 2, 16), (4, 1, 16), (7, 1, 16), (3, 5, 16), (16,), (0, 16)])
def test_without_gradients_a_linear_layer_of_any_number_of_rows_is_that_of_float64(library, biased, shape):
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


def test_few_rows_stay_with_blas(library, monkeypatch):
    asked = []
    monkeypatch.setattr(products, "takes_onednn", lambda *tensors: asked.append(tensors) or False)
    product(torch.ones(7, 4), torch.ones(2, 4))
    assert not asked
    product(torch.ones(8, 4), torch.ones(2, 4))
    assert len(asked) == 1


def test_a_loaded_model_multiplies_by_it_and_a_copy_or_an_adapter_notices_nothing(toy_model):
    from peft import LoraConfig, get_peft_model

    model = toy_model()
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is products.Linear
    assert type(model.get_vision_tower().vision_tower.vision_model.encoder.layers[0].mlp.fc1) is products.Linear
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert "layers.0.self_attn.q_proj.lora_A" in str(list(adapted.state_dict()))


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(40, 30, 90), (90, 30, 40), (40, 90, 30), (50, 50, 50), (9, 700, 1)]
)
@pytest.mark.parametrize("given", [True, False])
def test_a_large_product_is_made_in_parts_and_is_the_same(library, monkeypatch, rows, inner, columns, given):
    monkeypatch.setattr(products, "MOST_NUMBERS", 600)
    torch.manual_seed(0)
    left, right = torch.randn(inner, rows).t(), torch.randn(columns, inner)
    out = torch.full((rows, columns), 7.0) if given else None
    found = product(left, right, out=out)
    assert out is None or found is out
    torch.testing.assert_close(found.double(), left.double() @ right.double().t(), rtol=1e-5, atol=1e-5)
