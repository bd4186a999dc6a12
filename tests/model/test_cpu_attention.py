"""Attention by blocks of queries on the CPU against a softmax that is written out."""

import pytest
import torch

from llava_lite.model import cpu_attention
from llava_lite.model.attention import varlen_attention
from llava_lite.model.cpu_attention import attend_on_cpu, attends_here, plan_blocks

ENDS = [0, 5, 6, 18]
H, DH = 4, 8


def states(num_key_heads=H, seed=0):
    """Return query, key, value of 18 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ENDS[-1], heads, DH, generator=generator) for heads in (H, num_key_heads, num_key_heads)]


def written_out(query, key, value, window=None):
    """Attend in float64 by one mask over all tokens."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (key, value))
    sample = torch.bucketize(torch.arange(ENDS[-1]), torch.tensor(ENDS[1:]), right=True)
    at = torch.arange(ENDS[-1])
    seen = (sample[:, None] == sample) & (at <= at[:, None])
    if window is not None:
        seen &= at > at[:, None] - window
    scores = torch.einsum("qhd,khd->hqk", query, key) / DH**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def gradients(function, tensors):
    """Return the output and the gradients of a weighted sum of it."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    weights = torch.randn(ENDS[-1], H, DH, generator=torch.Generator().manual_seed(9))
    if len(out) < ENDS[-1]:
        weights = weights[ROWS]
    (out * weights).sum().backward()
    return [out.detach().float(), *(t.grad for t in tensors)]


ROWS = [1, 4, 6, 9, 17]


@pytest.mark.parametrize("block", [2, 3, 128])
@pytest.mark.parametrize("num_key_heads", [H, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_output_and_gradients_are_those_of_a_softmax_over_seen_keys(monkeypatch, block, num_key_heads, window, rows):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    query, key, value = states(num_key_heads)
    ours = gradients(
        lambda q, k, v: attend_on_cpu(*(q if rows is None else q[rows], k, v), ENDS, None, window, rows),
        (query, key, value),
    )
    theirs = gradients(
        lambda q, k, v: written_out(q, k, v, window)[... if rows is None else rows], (query, key, value)
    )
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, atol=2e-6, rtol=1e-5)


def test_no_token_reads_another_sample():
    query, key, value = states()
    before = attend_on_cpu(query, key, value, ENDS)
    for tensor in (query, key, value):
        tensor[:5] = torch.randn(5, H, DH)
    assert torch.equal(attend_on_cpu(query, key, value, ENDS)[5:], before[5:])


def test_blocks_meet_no_key_behind_their_last_query(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 4)
    blocks = list(plan_blocks([0, 10, 11]))
    assert [(b.queries.start, b.queries.stop, b.keys.start, b.keys.stop) for b in blocks] == [
        (0, 4, 0, 4),
        (4, 8, 0, 8),
        (8, 10, 0, 10),
        (10, 11, 10, 11),
    ]
    assert [b.hidden.shape[1] for b in blocks] == [3, 3, 1, 0]


def test_samples_without_a_wanted_row_are_left_out():
    blocks = list(plan_blocks([0, 10, 20, 30], rows=[3, 25, 29]))
    assert [(b.queries, b.keys) for b in blocks] == [(slice(0, 1), slice(0, 4)), (slice(1, 3), slice(20, 30))]


def test_scores_are_not_kept():
    kept = []
    tensors = [t.requires_grad_() for t in states()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        attend_on_cpu(*tensors, ENDS)
    assert kept == [t.shape for t in tensors]


def test_second_derivative_is_refused():
    tensors = [t.requires_grad_() for t in states()]
    (grad,) = torch.autograd.grad(attend_on_cpu(*tensors, ENDS).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_float32_on_the_cpu_comes_here():
    query = states()[0]
    assert attends_here(query)
    assert not attends_here(query, query.bfloat16())
    assert not attends_here(query, dropout=0.1)
    assert not attends_here(query.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not attends_here(query)


def test_permission_to_round_is_given_back_and_changes_no_product():
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has no such setting, and none is touched")
    before = settings.fp32_precision
    left, right = torch.rand(3, 64, 200), torch.rand(3, 200, 64)
    whole = next(cpu_attention.plan_blocks([0, cpu_attention.BLOCK]))
    assert whole.is_common
    with cpu_attention.quick_products(whole):
        product = left @ right
    assert settings.fp32_precision == before
    torch.testing.assert_close(product.double(), left.double() @ right.double(), atol=1e-4, rtol=0)


def test_permission_is_given_back_by_the_last_of_two_threads():
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not cpu_attention._onednn_is_exact():
        pytest.skip("oneDNN takes no float32 products here")
    before, block = settings.fp32_precision, next(plan_blocks([0, cpu_attention.BLOCK]))
    first, second = cpu_attention.quick_products(block), cpu_attention.quick_products(block)
    # As two threads would, each of which goes on before the other is done.
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    during = settings.fp32_precision
    second.__exit__(None, None, None)
    assert block.is_common
    assert (during, settings.fp32_precision) == ("bf16", before)


def test_permission_is_asked_for_shapes_that_come_again(monkeypatch):
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    size = cpu_attention.BLOCK
    blocks = list(cpu_attention.plan_blocks([0, 2 * size + 5, 2 * size + 9]))
    assert [block.is_common for block in blocks] == [True, True, False, False]
    # Without wide vectors, or without the setting, nothing is asked for any shape.
    asks = cpu_attention.takes_onednn() and hasattr(settings, "fp32_precision")
    monkeypatch.setattr(cpu_attention, "_onednn_is_exact", lambda: asks)
    before = getattr(settings, "fp32_precision", None)
    for block in blocks:
        with cpu_attention.quick_products(block):
            during = getattr(settings, "fp32_precision", None)
            assert during == ("bf16" if asks and block.is_common else before)


@pytest.mark.parametrize("rows", [None, ROWS])
def test_varlen_attention_leads_here(monkeypatch, rows):
    module = torch.nn.Identity()
    query, key, value = states()
    ends = torch.tensor(ENDS, dtype=torch.int32)
    asked = [(query if rows is None else query[rows]), key, value]
    batched = [t.transpose(0, 1)[None] for t in asked]
    more = {} if rows is None else {"query_rows": torch.tensor(rows)}
    out, _ = varlen_attention(module, *batched, None, cu_seq_lens_q=ends, max_length_q=12, **more)
    assert torch.equal(out[0], attend_on_cpu(*asked, ENDS, rows=rows))


def test_masks_are_not_kept_and_a_window_that_no_sample_fills_hides_nothing():
    query, key, value = (torch.randn(300, 2, 8, requires_grad=True) for _ in range(3))
    out = cpu_attention.attend_on_cpu(query, key, value, [0, 100, 300], window=200)
    assert not any(isinstance(kept, torch.Tensor) for kept in out.grad_fn.plan)
    for wide, none in zip(
        cpu_attention.plan_blocks([0, 100, 300], None, 200), cpu_attention.plan_blocks([0, 100, 300]), strict=True
    ):
        assert torch.equal(wide.hidden, none.hidden)


def test_another_default_dtype_changes_nothing():
    given = [torch.randn(40, 2, 8, requires_grad=True) for _ in range(3)]
    expected = cpu_attention.attend_on_cpu(*given, [0, 40])
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = cpu_attention.attend_on_cpu(*given, [0, 40])
        out.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)
