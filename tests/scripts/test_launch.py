"""The launchers: each gets its own options, and two ranks train the same whichever way they are started."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, ["deepspeed"]),
        ({"NUM_GPUS": "4", "MASTER_PORT": "7"}, ["deepspeed", "--num_accelerators", "4", "--master_port", "7"]),
        ({"HOSTFILE": "my hosts"}, ["deepspeed", "--hostfile", "my hosts"]),
        (
            {"HOSTFILE": "h", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            ["deepspeed", "--hostfile", "h", "--no_ssh", "--node_rank", "1", "--master_addr", "n0"],
        ),
        ({"LAUNCHER_ARGS": "--include a@b"}, ["deepspeed", "--include", "a@b"]),
        (
            {"LAUNCHER": "torchrun", "NUM_GPUS": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            [
                "torchrun",
                "--nnodes",
                "2",
                "--nproc_per_node",
                "8",
                "--node_rank",
                "1",
                "--master_addr",
                "n0",
                "--master_port",
                "29500",
            ],
        ),
        (
            {"LAUNCHER": "accelerate", "NUM_GPUS": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            [
                "accelerate",
                "launch",
                "--num_machines",
                "2",
                "--num_processes",
                "16",
                "--machine_rank",
                "1",
                "--main_process_ip",
                "n0",
                "--main_process_port",
                "29500",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--multi_gpu",
            ],
        ),
    ],
)
def test_launcher_gets_its_own_options(variables, command, launched):
    assert launched("pretrain", **variables)[0] == command


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LAUNCHER": "mpirun"}, "unknown LAUNCHER 'mpirun'; known: deepspeed, torchrun, accelerate, srun."),
        ({"LAUNCHER": "srun"}, "LAUNCHER=srun is for a task of srun"),
        ({"LAUNCHER": "srun", "SLURM_PROCID": "0"}, "needs MASTER_ADDR and MASTER_PORT"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 with LAUNCHER=deepspeed needs HOSTFILE"),
    ],
)
def test_launcher_that_cannot_work_is_refused(variables, message, bash, echo):
    done = bash(ROOT / "scripts/v1_5/pretrain.sh", path=echo, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_dry_run_prints_a_command_that_can_be_pasted(bash, echo):
    done = bash(ROOT / "scripts/v1_5/pretrain.sh", "--seed", "5", path=echo, DRY_RUN="1", OUTPUT="my output")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["deepspeed", str(ROOT / "llava_lite/train/train_mem.py")]
    assert words[words.index("--output_dir") + 1] == "my output"
    assert words[-2:] == ["--seed", "5"]


@pytest.fixture
def slurm(echo):
    """Return the variables of a job of 16 tasks on 2 nodes; srun starts its tenth alone, as `python` prints it."""
    (echo / "scontrol").write_text('#!/bin/sh\nif [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "$@"; fi\n')
    task = "SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 SLURM_STEP_TASKS_PER_NODE='8(x2)'"
    (echo / "srun").write_text(f'#!/bin/sh\nshift\n{task} exec "$@"\n')
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    (echo / "python").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"print(json.dumps([{{name: os.environ[name] for name in {names}}}, sys.argv[1:]]))\n"
        "sys.exit(int(os.environ['STATUS']))\n"
    )
    for name in ("scontrol", "srun", "python"):
        (echo / name).chmod(0o755)
    return {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[7-8]"}


def test_slurm_example_calls_the_recipe_once_a_rank(bash, echo, slurm):
    script = ROOT / "scripts/slurm/finetune.sbatch"
    done = bash(script, "finetune", "--seed", "5", path=echo, cwd=ROOT, STATUS="0", **slurm)
    assert done.returncode == 0, done.stderr
    ranks, command = json.loads(done.stdout)
    assert ranks == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "n7",
        "MASTER_PORT": "20012",
    }
    assert command[0] == str(ROOT / "llava_lite/train/train_mem.py")
    assert command[-2:] == ["--seed", "5"]


@pytest.mark.parametrize(("status", "reported"), [("75", ["requeue 12"]), ("1", [])])
def test_slurm_job_is_queued_again_only_if_it_saved_in_time(status, reported, bash, echo, slurm):
    done = bash(ROOT / "scripts/slurm/finetune.sbatch", "finetune", path=echo, cwd=ROOT, STATUS=status, **slurm)
    assert done.returncode == int(status)
    assert [line for line in done.stdout.splitlines() if line.startswith("requeue")] == reported


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


# What pdsh does, on this host and without ssh: the command once for each host of -w, %n its number; the worst status.
PDSH = """#!/usr/bin/env bash
while getopts "Sf:w:" option; do [ "$option" != w ] || IFS=, read -ra hosts <<<"$OPTARG"; done
shift $((OPTIND - 1))
command="$*" status=0
for i in "${!hosts[@]}"; do bash -c "${command//%n/$i}" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


class Cluster:
    """Two processes of stage 1 on toys, started in many ways; each must give the same losses."""

    def __init__(self, directory, llm, tower, data):
        self.directory, self.llm, self.tower = directory, llm, tower
        self.data_path, self.image_folder = data
        (directory / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        (directory / "pdsh").write_text(PDSH)
        (directory / "pdsh").chmod(0o755)

    def start(self, name, port, **variables):
        """Start pretrain.sh with the given variables of launch.sh, as a process."""
        path = os.pathsep.join([str(self.directory), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {
            **os.environ,
            **{"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            **{"MODEL": str(self.llm), "VISION_TOWER": str(self.tower), "OUTPUT": str(self.directory / name)},
            **{"DATA_PATH": self.data_path, "IMAGE_FOLDER": self.image_folder, "MASTER_PORT": port},
            **variables,
        }
        flags = "--per_device_train_batch_size 2 --max_steps 3 --save_strategy no --dataloader_num_workers 0"
        command = ["bash", str(ROOT / "scripts/v1_5/pretrain.sh"), *flags.split(), "--model_max_length", "256"]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def losses(self, name, *calls):
        """Run one call of the script for each dict of variables, at once, and return the losses that were logged."""
        port = free_port()
        started = [self.start(name, port, **variables) for variables in calls]
        outputs = [process.communicate(timeout=400)[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output[-6000:]
        lines = (self.directory / name / "metrics.jsonl").read_text().splitlines()
        assert (self.directory / name / "mm_projector.bin").is_file()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, toy_llm_dir, toy_tower_dir, toy_data):
    """Two ranks on toys."""
    return Cluster(tmp_path_factory.mktemp("cluster"), toy_llm_dir(), toy_tower_dir(), toy_data(text_only_every=0))


@pytest.fixture(scope="module")
def losses_of_two_ranks(cluster):
    """The losses of two ranks that the DeepSpeed launcher started on one host."""
    losses = cluster.losses("reference", {"NUM_GPUS": "2"})
    assert len(losses) == 3
    return losses


HOSTS = {"MASTER_ADDR": "127.0.0.1"}
WAYS = {
    "torchrun": [{"LAUNCHER": "torchrun", "NUM_GPUS": "2"}],
    "accelerate": [{"LAUNCHER": "accelerate", "NUM_GPUS": "2"}],
    "two nodes of torchrun": [
        {"LAUNCHER": "torchrun", "NUM_GPUS": "1", "NNODES": "2", "NODE_RANK": rank, **HOSTS} for rank in "01"
    ],
    "two tasks of srun": [
        {
            **{"LAUNCHER": "srun", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"},
            **{"SLURM_STEP_TASKS_PER_NODE": "2(x1)"},
            **HOSTS,
        }
        for rank in "01"
    ],
    "hostfile of two": [{"HOSTFILE": "hostfile", "LAUNCHER_ARGS": "--no_ssh_check", **HOSTS}],
    "hostfile of two, a call a node": [{"HOSTFILE": "hostfile", "NODE_RANK": rank, **HOSTS} for rank in "01"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_starting_two_ranks_gives_the_same_losses(way, cluster, losses_of_two_ranks):
    calls = [
        {**call, **({"HOSTFILE": str(cluster.directory / "hostfile")} if "HOSTFILE" in call else {})}
        for call in WAYS[way]
    ]
    assert cluster.losses(way.replace(" ", "_"), *calls) == losses_of_two_ranks
