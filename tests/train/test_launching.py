"""The command that runs a process's flags on all devices names files that exist where it is typed."""

from types import SimpleNamespace

import pytest

from llava_lite import deepspeed_files
from llava_lite.train.launching import launch_hint
from llava_lite.train.train import use_one_device

FLAGS = ["--output_dir", "my run", "--bf16", "True"]


def command_of(hint):
    return hint.splitlines()[-1].strip()


def test_hint_names_a_config_that_is_there(monkeypatch):
    monkeypatch.chdir(deepspeed_files.REPOSITORY)
    hint = launch_hint(FLAGS, 8)
    assert hint.startswith("this process trains on 1 of 8 devices.")
    assert command_of(hint) == (
        "deepspeed --module llava_lite.train.train --deepspeed zero2.json --output_dir 'my run' --bf16 True"
    )


@pytest.mark.parametrize(
    "argv", [["run.yaml", "--seed", "1"], ["--deepspeed=z.json"], ["--seed", "1", "--deepspeed", "z"]]
)
def test_flags_with_a_config_of_their_own_are_kept(argv):
    assert command_of(launch_hint(argv, 2)) == f"deepspeed --module llava_lite.train.train {' '.join(argv)}"


def test_without_a_config_at_hand_torchrun_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_files, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command_of(launch_hint(["--seed", "1"], 4)) == (
        "torchrun --nproc_per_node 4 -m llava_lite.train.train --seed 1"
    )


def test_hint_comes_only_where_devices_would_stay_idle(caplog):
    for n_gpu, times in ((0, 0), (1, 0), (8, 1)):
        caplog.clear()
        args = SimpleNamespace(n_gpu=n_gpu, _n_gpu=n_gpu)
        use_one_device(FLAGS, args)
        assert caplog.text.count("of 8 devices") == times
        assert args._n_gpu == min(n_gpu, 1)
