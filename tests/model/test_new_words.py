"""Vocabulary rows of new tokens train beside frozen matrices: the same numbers and gradients as in the matrix."""

import copy

import pytest
import torch
from conftest import float_error
from torch.nn import functional as F

from llava_lite.checkpoints.vocabulary import fit_rows
from llava_lite.model import lm_head as vocabulary_head
from llava_lite.model.new_words import grow, grown_layers
from llava_lite.model.plain_paths import set_plain_paths

NEW = [40, 52, 461]
IDS = torch.tensor([[1, 50, 40, 461, 70, 40, 90, 31], [1, 52, 60, 33, 70, 80, 461, 40]])


@pytest.fixture
def pair(toy_model):
    """Return a function: -> (a model with rows of its own for NEW, the same model whose full matrices train)."""

    def make(model_type="llama", dtype=torch.float32, is_tied=False, **config):
        model = toy_model(model_type, **config)
        if is_tied:
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.get_input_embeddings().weight
        if model_type == "phi":
            torch.nn.init.normal_(model.lm_head.bias)
        model = model.to(dtype).requires_grad_(False)
        full = copy.deepcopy(model)
        for layer in (full.get_input_embeddings(), full.get_output_embeddings()):
            layer.weight.requires_grad_(True)
        model.config.new_words = list(NEW)
        grow(model)
        return model.train(), full.train()

    return make


def shifted(model):
    """Return the model with other vocabulary rows for its new tokens, and leave the matrices as they are."""
    with torch.no_grad():
        for i, layer in enumerate(grown_layers(model).values()):
            layer.new_rows.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(i)))
    return model


def written_in(full, model):
    """Return the plain model with the other one's rows in its matrices."""
    with torch.no_grad():
        for plain, layer in zip(
            (full.get_input_embeddings(), full.get_output_embeddings()), grown_layers(model).values(), strict=True
        ):
            plain.weight[NEW] = layer.new_rows.to(plain.weight.dtype)
    return full


def assert_as_close_as_rounding(found, expected):
    """Compare sums that were made in other orders: off by a few roundings of their largest terms."""
    # Matmuls in half precision are summed in float32.
    tolerance = float_error(expected, 32 * 4 if expected.dtype == torch.float32 else 1)
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("plain_paths", [(), ("loss",)], ids=["fused", "plain"])
@pytest.mark.parametrize("chunk_logits", [2**23, 2**10], ids=["one_chunk", "chunks"])
@pytest.mark.parametrize(
    ("model_type", "dtype", "is_tied"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.float32, True),
        # With a bias, which stays that of the matrix.
        ("phi", torch.float32, False),
        ("qwen2", torch.bfloat16, False),
        ("llama", torch.bfloat16, True),
    ],
)
def test_vocabulary_rows_beside_the_matrices_act_as_rows_of_the_matrices(
    model_type, dtype, is_tied, chunk_logits, plain_paths, pair, monkeypatch
):
    monkeypatch.setitem(vocabulary_head.CHUNK_LOGITS, "cpu", chunk_logits)
    model, full = pair(model_type, dtype, is_tied)
    assert len(set(map(id, (layer.new_rows for layer in grown_layers(model).values())))) == (1 if is_tied else 2)
    written_in(full, shifted(model))
    for each in (model, full):
        set_plain_paths(each, plain_paths)
        each(input_ids=IDS, labels=IDS).loss.backward()
    for layer, plain in zip(
        grown_layers(model).values(), (full.get_input_embeddings(), full.get_output_embeddings()), strict=True
    ):
        assert_as_close_as_rounding(layer.new_rows.grad, plain.weight.grad[NEW])
        assert layer.new_rows.grad.abs().sum(1).min() > 0
        assert layer.weight.grad is None
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=IDS).logits, full.eval()(input_ids=IDS).logits
        assert_as_close_as_rounding(ours, theirs)
        generated = [each.generate(input_ids=IDS[:, :3], max_new_tokens=4, do_sample=False) for each in (model, full)]
    if dtype == torch.float32:
        assert torch.equal(*generated)


def test_vocabulary_rows_in_float32_train_beside_matrices_in_half_precision(pair):
    model, full = pair(dtype=torch.bfloat16)
    for layer in grown_layers(model).values():
        layer.new_rows.data = layer.new_rows.data.float()
    for each in (shifted(model), written_in(full, model)):
        with torch.autocast("cpu", torch.bfloat16):
            each(input_ids=IDS, labels=IDS).loss.backward()
    for layer, plain in zip(
        grown_layers(model).values(), (full.get_input_embeddings(), full.get_output_embeddings()), strict=True
    ):
        assert layer.new_rows.grad.dtype == torch.float32
        assert_as_close_as_rounding(layer.new_rows.grad, plain.weight.grad[NEW])


def test_a_batch_without_new_words_gives_their_rows_a_gradient_of_zeros(pair):
    model, _ = pair()
    model(input_ids=torch.tensor([[1, 5, 6, 7]]), labels=torch.tensor([[-100, 5, 6, 7]])).loss.backward()
    read, output = (layer.new_rows.grad for layer in grown_layers(model).values())
    # Every rank has a gradient to add up; that of the head makes words rarer that are not the answer.
    assert torch.equal(read, torch.zeros(3, 32))
    assert output.abs().sum() > 0


def test_a_head_in_few_bits_is_refused_by_name(toy_model):
    class FewBits(torch.nn.Linear):
        pass

    model = toy_model().requires_grad_(False)
    model.lm_head = FewBits(32, 462, bias=False).requires_grad_(False)
    model.config.new_words = NEW
    with pytest.raises(ValueError, match=r"rows of 3 new words cannot train beside a head layer of type FewBits"):
        grow(model)


def test_what_is_saved_has_the_vocabulary_rows_in_their_places(pair, tmp_path):
    for is_tied in (False, True):
        model, full = pair(is_tied=is_tied)
        written_in(full, shifted(model))
        model.save_pretrained(tmp_path / str(is_tied))
        opened = type(model).from_pretrained(tmp_path / str(is_tied))
        for ours, theirs in (
            (opened.get_input_embeddings(), full.get_input_embeddings()),
            (opened.get_output_embeddings(), full.get_output_embeddings()),
        ):
            assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drawn_vocabulary_rows_lie_apart_around_the_mean_and_are_the_same_in_every_process(dtype, toy_model):
    tables = []
    for _ in range(2):
        model = toy_model().to(dtype)
        old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head)]
        fit_rows(model, 462 + 300, 462, seed=4)
        tables.append([layer.weight.detach() for layer in (model.get_input_embeddings(), model.lm_head)])
    for first, again, before in zip(*tables, old, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[:462], before)
        drawn, before = first[462:].float(), before.float()
        # The mean of 300 draws is off by a seventeenth of their spread, in no dimension by 5 of these.
        assert ((drawn.mean(0) - before.mean(0)) / before.std(0)).abs().max() < 5 * 0.1 / 300**0.5
        assert ((drawn.std(0) / before.std(0)) - 0.1).abs().max() < 0.03
        assert len(drawn.unique(dim=0)) == 300
        # No two of them point the same way, as equal rows would.
        directions = F.normalize(drawn - before.mean(0), dim=1)
        assert (directions @ directions.T - torch.eye(300)).max() < 0.95
    model = toy_model().to(dtype)
    fit_rows(model, 462 + 300, 462, seed=5)
    assert not torch.equal(model.lm_head.weight[462:], tables[0][1][462:])


def test_without_a_seed_vocabulary_rows_are_the_mean_as_in_llava(toy_model):
    model = toy_model()
    fit_rows(model, 464, 462)
    for layer in (model.get_input_embeddings(), model.lm_head):
        torch.testing.assert_close(layer.weight[462:], layer.weight[:462].mean(0).expand(2, -1))
