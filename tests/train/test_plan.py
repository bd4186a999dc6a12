"""The plan of a run: its steps, and the command that makes it from configs alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from llava_lite.train.plan import main, num_steps_of, steps_of_run


def test_steps_of_a_run():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2.0)
    assert steps_of_run(10, 4, args) == 6
    args.max_steps = 5
    assert steps_of_run(10, 4, args) == 5


def test_packs_of_tokens_are_counted_by_tokens():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1, world_size=2, gradient_accumulation_steps=1)
    args.packing, args.packing_tokens, args.per_device_train_batch_size = "tokens", 1000, 1
    dataset = SimpleNamespace(lengths=np.full(970, 100))
    # 97,000 tokens in packs that are 97% full: 100 of them.
    assert num_steps_of(dataset, args) == 50


@pytest.mark.parametrize("stage", ["projector", "moe", "lora"])
def test_command_plans_from_configs_alone(stage, stage_flags, tmp_path, capsys):
    main([*stage_flags(stage, tmp_path / "out"), "--num_devices", "8"])
    out = capsys.readouterr().out
    assert "mm_projector" in out
    assert "8 devices, ZeRO-0, 8,192 tokens in a micro-batch (4 records of 2048, all learned), 0 of 4 layers" in out
    assert "total" in out
    assert not (tmp_path / "out").exists()


def test_command_says_how_many_layers_a_device_has_room_for(stage_flags, tmp_path, capsys):
    flags = stage_flags("full", tmp_path / "out", "--gradient_checkpointing", "auto")
    main([*flags, "--device_memory", "0.095"])
    out = capsys.readouterr().out
    assert "2 of 4 layers checkpointed" in out
    assert "without checkpointing 0.10 GiB, room for 0.08 GiB" in out
    main([*flags, "--packing", "tokens", "--per_device_train_batch_size", "1", "--packing_tokens", "4096"])
    assert "4,096 tokens in a micro-batch (a pack, all learned), 0 of 4 layers" in capsys.readouterr().out
