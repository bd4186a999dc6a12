"""A run that has gone wrong stops and reports where."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.train.monitor.guards import GradientWatch, describe_gradient, describe_loss


def group(name, *params):
    return SimpleNamespace(name=name, parameters=params)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_not_finite_is_reported_with_the_sample_ids(value):
    message = describe_loss(torch.tensor(value), ["a", "b"], 7)
    assert message.startswith(f"step 7: rank 0: loss {value} for samples ['a', 'b']. ")


def test_finite_loss_passes():
    assert describe_loss(torch.tensor(1e30), ["a"], 1) == ""


def test_gradient_that_is_not_finite_is_reported_with_the_sample_ids():
    message = describe_gradient(torch.tensor(float("inf")), ["x"], 3)
    assert message.startswith(
        "step 3: the losses are finite but the gradient norm is inf; samples of the step: ['x']. "
    )
    assert describe_gradient(2.0, ["x"], 3) == ""
    assert describe_gradient(None, ["x"], 3) == ""


def test_watch_is_content_once_every_group_had_a_gradient():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    watch = GradientWatch([group("decoder", a), group("mm_projector", b)])
    (a.sum() + b.sum()).backward()
    watch.check(has_images=True)
    assert watch.handles == []
    # The hooks are gone: nothing is noted any more.
    watch.seen = {}
    a.sum().backward()
    assert watch.seen == {}


def test_watch_names_the_group_without_gradient():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    watch = GradientWatch([group("decoder", a), group("embeddings", b)])
    (a.sum() + 0 * b.sum()).backward()
    with pytest.raises(ValueError, match="embeddings should train but got no gradient in the first step"):
        watch.check(has_images=True)


def test_watch_waits_for_an_image_before_it_blames_the_connector():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    watch = GradientWatch([group("decoder", a), group("mm_projector_no_decay", b)])
    a.sum().backward()
    watch.check(has_images=False)
    assert watch.handles
    with pytest.raises(ValueError, match="mm_projector_no_decay should train"):
        watch.check(has_images=True)


def test_watch_lets_an_exempt_group_be():
    a = torch.nn.Parameter(torch.ones(2))
    watch = GradientWatch([group("router", a)])
    watch.check(has_images=True, exempt=("router",))
    with pytest.raises(ValueError, match="router should train"):
        watch.check(has_images=True)
