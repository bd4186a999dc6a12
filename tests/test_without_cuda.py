"""A program that sends its tensors to CUDA runs on a machine without it, inside `CudaOnCpu`."""

import pytest
import torch

from llava_lite.without_cuda import CudaOnCpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is tried here is the lack of it")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "send",
    [
        lambda t: t.cuda(),
        lambda t: t.cuda(0, non_blocking=True),
        lambda t: t.to("cuda"),
        lambda t: t.to("cuda:1", torch.float32, non_blocking=True),
        lambda t: t.to(CUDA),
        lambda t: t.to(0),
        lambda t: t.to(1, non_blocking=True),
        lambda t: t.to(device="cuda", non_blocking=True),
        lambda t: t.half().cuda().float(),
        lambda t: torch.tensor(t.tolist(), device="cuda"),
        lambda t: torch.as_tensor(t, device=CUDA),
        lambda t: t + torch.zeros(3, device=0),
        lambda t: t.new_zeros(3, device="cuda") + t,
    ],
)
def test_what_is_sent_to_cuda_is_on_the_cpu(send):
    values = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises((AssertionError, RuntimeError)):
        send(values)
    with CudaOnCpu():
        sent = send(values)
    assert sent.device.type == "cpu"
    assert torch.equal(sent, values)


def test_modules_stay_where_they_are_and_other_places_are_untouched():
    with CudaOnCpu():
        layer = torch.nn.Linear(2, 3).cuda().to("cuda").to(0).to(CUDA, dtype=torch.float64)
        assert layer.weight.device.type == "cpu"
        assert layer.weight.dtype == torch.float64
        assert torch.ones(2, device="meta").device.type == "meta"
        assert torch.ones(2).to("meta").device.type == "meta"
        assert torch.equal(torch.einsum("ij,j->i", torch.eye(2), torch.ones(2)), torch.ones(2))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2).cuda()
