"""Toy stages: the flags of a run of seconds, and a function that runs them in this process."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_lite.train.monitor.plots import has_matplotlib

# The flags of each stage beside the common ones; MODEL and ADAPTER are filled in.
STAGES = {
    "projector": "--tuning projector --version plain --learning_rate 1e-2",
    "full": "--tuning full --version v1 --image_aspect_ratio pad --learning_rate 1e-3",
    "lora": "--tuning lora --lora_r 4 --version v1 --learning_rate 1e-3",
    "moe": "--tuning moe --moe_mode sparse --num_experts 4 --version v1 --learning_rate 1e-3",
}


@pytest.fixture
def stage_flags(tmp_path, monkeypatch, toy_llm_dir, toy_tower_dir, toy_data):
    """Return a function: (stage, output directory, more flags) -> flags of a run; later flags win."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))

    def make(stage, output_dir, *more, data=None, model=None):
        if data is None:
            data = toy_data(
                tmp_path / f"data_{stage}", **({"text_only_every": 0, "num_turns": 1} if stage == "projector" else {})
            )
        common = (
            f"--model_name_or_path {model or toy_llm_dir('llama')} --vision_tower {toy_tower_dir('clip')} "
            f"--data_path {data[0]} --image_folder {data[1]} --output_dir {output_dir} --use_cpu True "
            "--per_device_train_batch_size 4 --lr_scheduler_type constant --warmup_steps 0 --save_strategy no "
            "--disable_tqdm True"
        )
        fresh = "" if model else "--mm_projector_type mlp2x_gelu"
        return [*common.split(), *fresh.split(), *STAGES[stage].split(), *map(str, more)]

    return make


@pytest.fixture
def plots():
    """For a test that needs the plots of a run."""


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    """Hide matplotlib from tests that do not ask for plots: drawing them is a fifth of a toy's run."""
    if "plots" in request.fixturenames:
        yield
        return
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    has_matplotlib.cache_clear()
    yield
    has_matplotlib.cache_clear()


@pytest.fixture
def unloadable(tmp_path, toy_llm_dir):
    """A language model whose config can be read and whose weights cannot."""
    directory = tmp_path / "unloadable"
    shutil.copytree(toy_llm_dir("llama"), directory)
    (directory / "model.safetensors").write_bytes(b"no weights")
    return directory


@pytest.fixture
def run_stage(stage_flags):
    """Return a function: the arguments of stage_flags -> the trainer after its run."""
    from llava_lite.train.train import train

    return lambda *args, **kwargs: train(stage_flags(*args, **kwargs))


@pytest.fixture
def run_with_fault(tmp_path):
    """Return a function: (fault of fault_worker.py, flags, number of ranks) -> exit codes and logs of the ranks."""
    root, worker = Path(__file__).parents[2], Path(__file__).with_name("fault_worker.py")

    def start(fault, flags, num_ranks=1, limit_s=600):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(root)}
        logs, ranks = [tmp_path / f"{rank}.log" for rank in range(num_ranks)], []
        for rank, log in enumerate(logs):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_SIZE": num_ranks}
            own = {key: str(value) for key, value in own.items()} if num_ranks > 1 else {}
            command = [sys.executable, str(worker), fault, *flags]
            with open(log, "w") as file:
                ranks.append(
                    subprocess.Popen(command, env=env | own, cwd=root, stderr=file, stdout=subprocess.DEVNULL)
                )
        try:
            codes = [rank.wait(limit_s) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return codes, [log.read_text() for log in logs]

    return start


@pytest.fixture
def speak(monkeypatch):
    """Return a function: name of a template -> it is the default conversation."""
    from llava_lite import conversation

    return lambda name: monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates[name])
