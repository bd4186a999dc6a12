"""The plan of a run: its steps, and the command that makes it from configs alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llava_lite.commands.plan import main
from llava_lite.train.estimate.plan import get_num_steps, get_run_steps

ROOT = Path(__file__).parents[3]


def test_steps_of_a_run():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2.0, dataloader_drop_last=False)
    assert get_run_steps(10, 4, args) == 6
    args.dataloader_drop_last, args.gradient_accumulation_steps = True, 1
    assert get_run_steps(10, 4, args) == 4
    # Micro-batches of 2: five of them, and the last step has one.
    args.gradient_accumulation_steps = 2
    assert get_run_steps(11, 4, args) == 6
    args.max_steps = 5
    assert get_num_steps(range(10), args) == 5


def test_packs_of_tokens_are_counted_by_tokens():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1, world_size=2, gradient_accumulation_steps=1)
    args.dataloader_drop_last = False
    args.packing, args.packing_tokens, args.per_device_train_batch_size = "tokens", 1000, 1
    dataset = SimpleNamespace(lengths=np.full(970, 100))
    # 97,000 tokens in packs that are 97% full: 100 of them.
    assert get_num_steps(dataset, args) == 50


@pytest.mark.parametrize("stage", ["projector", "moe", "lora"])
def test_command_plans_from_configs_alone(stage, stage_flags, tmp_path, capsys):
    main([*stage_flags(stage, tmp_path / "out"), "--num_devices", "8"])
    out = capsys.readouterr().out
    assert "mm_projector" in out
    assert "8 devices, ZeRO-0, 8,192 tokens in a micro-batch (4 records of 2048, all supervised), 0 of 4 layers" in out
    assert "total" in out
    assert not (tmp_path / "out").exists()


def test_a_laptop_plans_for_devices_that_have_bfloat16(stage_flags, tmp_path, capsys):
    flags = stage_flags("projector", tmp_path / "out")
    for more, is_half in (((), True), (("--bf16", "True"), True), (("--bf16=False",), False)):
        main([*flags, *more])
        assert ("bfloat16" in capsys.readouterr().out) == is_half


def test_command_reports_how_many_layers_a_device_has_room_for(stage_flags, tmp_path, capsys):
    flags = stage_flags("full", tmp_path / "out", "--gradient_checkpointing", "auto", "--bf16", "False")
    main([*flags, "--device_memory", "0.1"])
    out = capsys.readouterr().out
    assert "2 of 4 layers checkpointed" in out
    assert "without checkpointing 0.11 GiB, room for 0.09 GiB" in out
    main([*flags, "--packing", "tokens", "--per_device_train_batch_size", "1", "--packing_tokens", "4096"])
    assert "4,096 tokens in a micro-batch (a pack, all supervised), 0 of 4 layers" in capsys.readouterr().out


def test_command_plans_for_the_experts_that_a_model_has(run_stage, stage_flags, tmp_path, capsys):
    layers = ("--moe_mode", "dense", "--num_experts", 2)
    run_stage("moe", tmp_path / "moe", "--max_steps", 1, *layers)
    capsys.readouterr()
    flags = stage_flags("full", tmp_path / "out", "--tuning", "moe", model=tmp_path / "moe")
    main(flags)
    out = capsys.readouterr().out
    # 4 layers of 2 experts of 3 matrices of 32 x 64.
    assert [line.split()[1] for line in out.splitlines() if line.startswith("experts ")] == ["49,152"]
    with pytest.raises(ValueError, match=r"--num_experts 4 and has 2\."):
        main([*flags, "--num_experts", "4"])


# A process of its own: DeepSpeed's flags change the environment and leave a process group.
PLANS = """
import json, sys
from llava_lite.commands.plan import main
for name, flags in json.loads(sys.argv[1]).items():
    print("==", name)
    try:
        main(flags)
    except ValueError as error:
        print("refused:", error)
"""


def plans_of(flags):
    """Return what the command prints of each entry of {name: flags}."""
    command = [sys.executable, "-c", PLANS, json.dumps(flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [part.partition("\n") for part in done.stdout.split("== ")[1:]]
    return {name: text for name, _, text in parts}


def test_command_plans_for_every_zero_and_for_expert_parallel_ranks(stage_flags, tmp_path):
    full = [*stage_flags("full", tmp_path / "out"), "--num_devices", "8", "--deepspeed"]
    moe = [*stage_flags("moe", tmp_path / "out"), "--num_devices", "8", "--deepspeed", "zero2", "--ep_size"]
    configs = ("zero3.json", "zero3_offload", "scripts/zero3_offload_nvme.json")
    plans = plans_of({name: [*full, name] for name in configs} | {ep_size: [*moe, ep_size] for ep_size in "143"})
    assert all("8 devices, ZeRO-3" in plans[name] for name in configs)
    offloaded = [name for name in configs if "in the memory of the host, or on its disks" in plans[name]]
    assert offloaded == ["zero3_offload", "scripts/zero3_offload_nvme.json"]
    weights = {
        ep_size: float(next(line for line in plans[ep_size].splitlines() if line.startswith("weights ")).split()[1])
        for ep_size in "14"
    }
    (experts,) = [line.split()[1] for line in plans["4"].splitlines() if line.startswith("experts ")]
    # Each of four ranks holds a quarter of the experts; toys train in float32.
    assert weights["1"] - weights["4"] == pytest.approx(0.75 * 4 * int(experts.replace(",", "")) / 2**20, abs=0.11)
    assert "refused: --ep_size 3 and --num_experts 4: so many ranks cannot divide them evenly" in plans["3"]


@pytest.mark.parametrize("flag", ["--num_devices 0", "--num_devices -4", "--mfu 40", "--mfu 0", "--bandwidth 0"])
def test_numbers_that_no_cluster_has_are_refused(flag, stage_flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*stage_flags("full", tmp_path / "out"), *flag.split()])
    assert f"argument {flag.split()[0]}" in capsys.readouterr().err
