"""The arithmetic of many devices: by hand, in the page, and beside what two ranks send and hold."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_lite.commands.plan import main as plan
from llava_lite.train.estimate.scale import (
    Cluster,
    Step,
    Weights,
    Work,
    get_fit,
    get_hours,
    get_step,
    get_weights,
    sent_bytes,
)
from playground.scaling_page import PAGE, filled, tables

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]


def test_volume_of_a_step_is_the_papers():
    weights = Weights(all=1000, in_backward=800, trained=400)
    # Two bytes a weight; of four devices in a ring each sends three quarters.
    assert sent_bytes(weights, 0, 4) == {"reduce": 600, "gather": 600}
    assert sent_bytes(weights, 1, 4, num_micro=3) == {"reduce": 600, "gather": 600}
    assert sent_bytes(weights, 2, 4) == {"reduce": 600, "gather": 1200}
    assert sent_bytes(weights, 2, 4, num_micro=3) == {"reduce": 1800, "gather": 2400}
    assert sent_bytes(weights, 3, 4) == {"reduce": 600, "gather": 2700}
    assert sent_bytes(weights, 3, 4, num_micro=3) == {"reduce": 1800, "gather": 8100}
    assert sum(sent_bytes(weights, 3, 1).values()) == 0


def test_backward_pass_goes_through_what_follows_the_first_trained_weight(toy_model):
    model = toy_model()
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    tower = sum(p.numel() for p in model.get_vision_tower().parameters())
    projector = sum(p.numel() for p in model.get_model().mm_projector.parameters())
    full = sum(p.numel() for p in model.parameters())
    assert get_weights(model) == (full, full - tower, projector)
    model.get_vision_tower().requires_grad_(True)
    assert get_weights(model) == (full, full, projector + tower)


def test_steps_keep_the_recipes_batch_until_there_are_more_devices(toy_model):
    work = Work(num_records=1000, tokens=30, supervised=5, images=1, global_batch=128)
    found = [get_step(toy_model(), work, 2, Cluster(n), largest_micro=8)[:3] for n in (1, 8, 24, 128, 512)]
    assert found == [(8, 16, 128), (8, 2, 128), (6, 1, 144), (1, 1, 128), (1, 1, 512)]


def test_hours_are_of_the_slower_part_or_of_both():
    step = Step(micro_batch=1, num_micro=1, global_batch=100, sent_bytes=0, work_s=36, send_s=72)
    assert get_hours(step, Work(1000, 1, 1, 1, 100)) == (0.2, 0.3)


def test_ring_through_nodes_is_as_fast_as_its_slowest_link():
    assert Cluster(8).bandwidth == Cluster().node_bandwidth
    assert Cluster(9).bandwidth == Cluster().network_bandwidth


def test_a_device_checkpoints_what_it_has_no_room_for(toy_model):
    model, work = toy_model(), Work(1, 1000, 100, 1, 1)
    roomy = get_fit(model, work, 3, Cluster(2), 4)
    assert (roomy.num_checkpointed, roomy.fits) == (0, True)
    tight = get_fit(model, work, 3, Cluster(2, memory_bytes=roomy.total), 4)
    assert 0 < tight.num_checkpointed < 4
    assert tight.total <= 0.88 * roomy.total
    assert not get_fit(model, work, 3, Cluster(2, memory_bytes=roomy.states), 4).fits


def test_page_holds_the_tables_that_its_functions_make():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, tables()) == page, "write them again: python -m playground.scaling_page --write"
    with pytest.raises(ValueError, match="no place for the table 'other'"):
        filled(page, {"other": ""})


def test_command_reports_what_is_sent_and_how_long_a_pass_takes(stage_flags, tmp_path, capsys):
    flags = stage_flags("full", tmp_path / "out", "--bf16", "False")
    plan(
        [
            *flags,
            "--num_devices",
            "16",
            "--num_records",
            "6400",
            "--mfu",
            "0.5",
            "--peak_tflops",
            "1",
            "--bandwidth",
            "1",
        ]
    )
    out = capsys.readouterr().out
    # 68,832 weights of 4 bytes train: summed and gathered, and in a ring of 16 each sends 15 of 16 parts.
    assert f"a device sends {68_832 * 4 * 2 * 15 / 16 / 1e9:.3f} GB a step (computed)" in out
    assert "6,400 records: 0.00 hours with communication hidden by compute" in out


@pytest.fixture(scope="module")
def counted(tmp_path_factory, toy_llm_dir, toy_tower_dir, toy_data):
    """What each of two ranks sent and held: results of traffic_worker.py, a rank each."""
    directory = tmp_path_factory.mktemp("traffic")
    data, images = toy_data(text_only_every=0)
    # Of a toy, everything would still be there from the forward pass.
    forgetful = json.loads((ROOT / "zero3.json").read_text())
    forgetful["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    (directory / "zero3.json").write_text(json.dumps(forgetful))
    common = (
        f"--model_name_or_path {toy_llm_dir('llama')} --vision_tower {toy_tower_dir('clip')} --data_path {data} "
        f"--image_folder {images} --mm_projector_type mlp2x_gelu --tuning full --use_cpu True --bf16 True "
        "--per_device_train_batch_size 2 --save_strategy no --disable_tqdm True --lr_scheduler_type constant "
        "--warmup_steps 0 --deepspeed"
    ).split()
    cases = {
        "zero2": [*common, "zero2.json"],
        "zero2, 3 micro-batches": [*common, "zero2.json", "--gradient_accumulation_steps", "3"],
        "zero3": [*common, str(directory / "zero3.json")],
    }
    (directory / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, str(HERE / "traffic_worker.py")]
    command += [str(directory / "cases.json"), str(directory / "results_RANK.json")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_send_what_is_computed(counted):
    for results in counted:
        for case, zero_stage, num_micro in (("zero2", 2, 1), ("zero2, 3 micro-batches", 2, 3), ("zero3", 3, 1)):
            expected = sent_bytes(Weights(*results[case]["weights"]), zero_stage, 2, num_micro)
            print(case, results[case]["sent"], expected)
            assert results[case]["sent"]["reduce"] == pytest.approx(expected["reduce"], rel=0.01)
            # ZeRO-3 gathers neither small weights nor the tower's layer that nobody reads.
            assert results[case]["sent"]["gather"] == pytest.approx(
                expected["gather"], rel=0.1 if zero_stage == 3 else 0.01
            )


@pytest.mark.slow
def test_two_ranks_hold_what_is_computed(counted):
    for results in counted:
        for case, result in results.items():
            weights, held = Weights(*result["weights"]), result["held"]
            full = weights.all * torch.bfloat16.itemsize
            expected = full // 2 + held["persistent"] if case == "zero3" else full
            assert held["weights"] == expected
            assert held["adam"] == weights.trained * 8 / 2
            assert held["master"] == weights.trained * 4 / 2
