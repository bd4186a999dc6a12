"""Variable-length attention against plain SDPA, and the selection of an implementation."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llava_lite.model import attention
from llava_lite.model.attention import (
    attend_segments,
    choose_attention,
    run_kernel,
    varlen_attention,
    window_arguments,
)

CAUSAL = SimpleNamespace(is_causal=True)


def plain(query, key, value, window=None):
    """Attend one sequence by the formula."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # [H, L, L]
    n = query.shape[-2]
    rows, columns = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = (columns <= rows) & (columns > rows - (window or n))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("left", [False, True])
def test_padded_sequences_equal_each_sequence_alone(left, window):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, real in enumerate((9, 5, 1)):
        mask[row, slice(9 - real, 9) if left else slice(0, real)] = True
    out, _ = varlen_attention(CAUSAL, query, key, value, mask, sliding_window=window)
    for row in range(3):
        q, k, v = (t[row][:, mask[row]] for t in (query, key, value))
        expected = plain(q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), window)
        assert torch.allclose(out[row][mask[row]], expected.transpose(0, 1), atol=1e-6)
    assert not out[~mask].any()


def test_packed_segments_do_not_see_each_other():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 12, 4, 8)
    out = attend_segments(query, key, value, torch.tensor([0, 5, 9, 12]))
    changed = key.clone()
    changed[:5] += 100
    again = attend_segments(query, changed, value, torch.tensor([0, 5, 9, 12]))
    assert torch.equal(out[5:], again[5:])
    assert not torch.allclose(out[:5], again[:5])


@pytest.mark.parametrize(("num_keys", "window"), [(4, None), (2, None), (1, 3), (4, 3), (2, 50)])
def test_a_packed_row_equals_each_sample_alone_and_so_do_its_gradients(num_keys, window):
    torch.manual_seed(0)
    query, grad = torch.randn(1, 4, 12, 8), torch.randn(1, 12, 4, 8)
    key, value = torch.randn(2, 1, num_keys, 12, 8)
    query, key, value = (t.requires_grad_() for t in (query, key, value))
    ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    out, _ = varlen_attention(
        CAUSAL, query, key, value, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=6
    )
    gradients = torch.autograd.grad(out, (query, key, value), grad)
    shared = 4 // num_keys
    expected = [
        plain(q, k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0), window)
        for q, k, v in zip(*(t[0].split([5, 1, 6], dim=1) for t in (query, key, value)), strict=True)
    ]
    expected = torch.cat(expected, dim=1).transpose(0, 1)[None]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_packed_row_with_a_cache_is_refused():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="3 queries and 5 keys: packed rows cannot have a cache"):
        varlen_attention(CAUSAL, query, key, key, None, cu_seq_lens_q=torch.tensor([0, 1, 3]))


def test_the_kernel_gets_keys_once_where_it_supports_grouped_queries():
    reported = {}

    def newer(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        reported.update(key=key, ends=cu_q, longest=max_k, scale=scale, window=window_size, gqa=enable_gqa)

    def older(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        reported.update(key=key, ends=cu_q, longest=max_k, scale=scale, window=window_size, gqa=False)

    query, key, ends = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.tensor([0, 2, 5])
    run_kernel(newer, query, key, key, ends, 3, 0.5, 7)
    assert (reported["key"] is key, reported["gqa"]) == (True, True)
    assert (reported["ends"] is ends, reported["longest"], reported["scale"], reported["window"]) == (
        True,
        3,
        0.5,
        (6, 0),
    )
    run_kernel(older, query, key, key, ends, 3, None, None)
    assert torch.equal(reported["key"], key[:, [0, 0, 1, 1]])
    assert (reported["scale"], reported["window"]) == (None, (-1, 0))


def test_a_decoding_step_sees_the_cache_but_not_its_padding():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    seen = attention.varlen_mask(2, 1, 7, q_offset=6, attention_mask=mask)
    out, _ = varlen_attention(CAUSAL, query, key, value, seen)
    expected = F.scaled_dot_product_attention(query[1:], key[1:, :, 3:], value[1:, :, 3:])
    assert torch.allclose(out[1:].transpose(1, 2), expected, atol=1e-6)


def test_a_static_caches_unwritten_keys_are_not_seen():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8)
    seen = attention.varlen_mask(1, 2, 9, q_offset=3)
    out, _ = varlen_attention(CAUSAL, query, key, value, seen)
    last = F.scaled_dot_product_attention(query[:, :, 1:], key[:, :, :5], value[:, :, :5])
    assert torch.allclose(out[:, 1:].transpose(1, 2), last, atol=1e-6)


def test_without_a_gpu_auto_is_sdpa_and_a_name_is_kept():
    assert choose_attention("auto", "cpu") == choose_attention(None, "cpu") == "sdpa"
    assert choose_attention("eager", "cpu") == "eager"
    assert choose_attention("sdpa", "cpu", packed=True) == "sdpa"


def test_packed_sequences_get_attention_sample_by_sample_where_auto_would_mask_them():
    assert choose_attention("auto", "cpu", packed=True) == "varlen"


@pytest.mark.parametrize(
    ("flash", "kernel", "chosen"), [(True, True, "flash_attention_2"), (False, True, "varlen"), (False, False, "sdpa")]
)
def test_auto_takes_the_best_that_is_installed_on_cuda(flash, kernel, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if flash else None)
    monkeypatch.setattr(attention, "find_varlen_kernel", lambda: object() if kernel else None)
    assert choose_attention("auto", "cuda") == chosen


def test_both_signatures_of_torchs_kernel_are_called_as_causal():
    assert window_arguments(lambda q, *, window_size=(-1, -1): q, None) == {"window_size": (-1, 0)}
    assert window_arguments(lambda q, *, window_size=(-1, -1): q, 4) == {"window_size": (3, 0)}
    assert window_arguments(lambda q, is_causal=False: q, None) == {"is_causal": True}
    with pytest.raises(ValueError, match="sliding_window 4 needs a torch"):
        window_arguments(lambda q, is_causal=False: q, 4)
