"""--ddp_timeout reaches the process groups that others make."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llava_lite.distributed.groups import GRACE_S, find_groups, set_group_timeouts


@pytest.fixture
def world(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def get_timeout(group):
    """The timeout that the backend has; it has no public name."""
    return group._get_backend(torch.device("cpu")).options._timeout


class Inner:
    """A ZeRO optimizer that accelerate wraps."""


class Engine(torch.nn.Module):
    """Holds groups as DeepSpeed's engine does."""


def test_every_group_that_engine_optimizer_and_modules_hold_gets_the_timeout_of_the_run(world):
    groups = [dist.new_group([0]) for _ in range(4)]
    engine, optimizer = Engine(), Inner()
    engine.seq_data_parallel_group = groups[0]
    engine.expert_data_parallel_group = {"ep_size_1": groups[1]}
    engine.experts = torch.nn.Linear(2, 2)
    engine.experts.group = groups[2]
    optimizer.optimizer = Inner()
    optimizer.optimizer.dp_process_group = groups[3]
    assert {id(group) for group in find_groups([engine, optimizer])} == {id(group) for group in groups}
    assert set_group_timeouts(15, engine, optimizer) == 5
    expected = timedelta(seconds=15 + GRACE_S)
    assert [get_timeout(group) for group in (dist.group.WORLD, *groups)] == [expected] * 5


def test_without_groups_nothing_is_set():
    assert set_group_timeouts(15, Engine()) == 0
