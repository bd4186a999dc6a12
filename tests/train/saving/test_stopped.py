"""Stages that signals stop at any place resume as the run never stopped: alone and on ranks, on every signal."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
EVERY_TWO = "--eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2 --load_best_model_at_end True"
AT_EPOCHS = "--eval_strategy epoch --save_strategy epoch --logging_strategy epoch"
MIXED = "--eval_strategy epoch --save_strategy steps --save_steps 3"


@pytest.fixture
def flags(tmp_path, monkeypatch, toy_llm_dir, toy_tower_dir, toy_data):
    """Return a function: more flags -> flags of a run of 6 steps in 2 epochs with dropout, evaluated on 6 records."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    llm = tmp_path / "llm"
    shutil.copytree(toy_llm_dir("llama"), llm)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    (data, images), (held_out, _) = toy_data(tmp_path / "data", 12), toy_data(tmp_path / "held_out", 6)
    common = (
        f"--model_name_or_path {llm} --vision_tower {toy_tower_dir('clip')} --mm_projector_type mlp2x_gelu "
        f"--tuning full --data_path {data} --image_folder {images} --eval_data_path {held_out} --num_train_epochs 2 "
        "--use_cpu True --learning_rate 0.01 --logging_steps 1 --disable_tqdm True --num_eval_generations 2 "
        "--eval_max_new_tokens 4 --per_device_eval_batch_size 1 --gradient_accumulation_steps 2"
    )

    def make(*more, batch, workers=0):
        own = f"--per_device_train_batch_size {batch} --dataloader_num_workers {workers}"
        return [*common.split(), *own.split(), *" ".join(more).split()]

    return make


def stop(name, step, at, rank=None):
    return {"signal": name, "step": step, "at": at, "rank": rank}


def run_cases(directory, cases, num_ranks=1, timeout_s=3000):
    """Run stopped_cases.py once over all cases on some ranks; return the results of each."""
    for name, case in cases.items():
        case["output"] = str(directory / name)
    (directory / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, HERE / "stopped_cases.py", directory / "cases.json", directory / "results_RANK.json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    if num_ranks > 1:
        common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in map(str, range(num_ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank} if num_ranks > 1 else {}
        with open(directory / f"log_{rank}.txt", "w") as log:
            ranks.append(subprocess.Popen(command, env=common | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * num_ranks, (directory / "log_0.txt").read_text()[-4000:]
    return [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(num_ranks)]


def assert_as_never_stopped(ranks, extra=()):
    """Compare stopped and resumed runs with those never stopped; extra: checkpoints that a signal alone has saved."""
    for results in ranks:
        for name, case in results.items():
            assert [found["code"] for found in case["stops"]] == [75] * len(case["stops"]), name
            full, again = case["full"], case["again"]
            taken = [ids for found in case["stops"] for ids in found["samples"]]
            assert taken + again.pop("samples") == full.pop("samples"), name
            assert set(again.pop("checkpoints")) - set(full.pop("checkpoints")) <= set(extra), name
            assert {key for key in full if full[key] != again[key]} == set(), name


def test_a_stage_that_is_stopped_in_evaluation_and_answer_becomes_the_one_never_stopped(flags, tmp_path):
    stops = [stop("SIGINT", 2, 3), stop("SIGHUP", 2, "answer"), stop("SIGTERM", 6, "step")]
    ranks = run_cases(tmp_path, {"steps": {"argv": flags(EVERY_TWO, batch=2), "stops": stops}})
    full = ranks[0]["steps"]["full"]
    assert [line["step"] for line in full["generations.jsonl"]] == [2, 2, 4, 4, 6, 6]
    assert [line["step"] for line in full["metrics.jsonl"] if "eval_loss" in line] == [2, 4, 6]
    assert_as_never_stopped(ranks)


@pytest.mark.slow
def test_stages_with_workers_that_are_stopped_become_those_never_stopped(flags, tmp_path):
    cases = {
        "epochs": {
            "argv": flags(AT_EPOCHS, batch=2, workers=2),
            "stops": [stop("SIGINT", 3, "step"), stop("SIGINT", 3, 2), stop("SIGHUP", 6, "answer")],
        },
        "mixed": {
            "argv": flags(MIXED, batch=2, workers=2),
            "stops": [stop("SIGTERM", 3, "answer"), stop("SIGHUP", 5, "step"), stop("SIGINT", 6, 1)],
        },
    }
    assert_as_never_stopped(run_cases(tmp_path, cases), extra=["checkpoint-5"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_stopped_together_and_become_the_run_never_stopped(flags, tmp_path, engine):
    more = [] if engine == "ddp" else [f"--deepspeed {ROOT / engine}.json"]
    cases = {
        # One rank alone gets the signal.
        "steps": {
            "argv": flags(EVERY_TWO, *more, batch=1),
            "stops": [stop("SIGINT", 2, 2, rank=1), stop("SIGTERM", 4, "step"), stop("SIGHUP", 6, "answer", rank=0)],
        },
        "epochs": {
            "argv": flags(AT_EPOCHS, *more, batch=1, workers=2),
            "stops": [stop("SIGHUP", 3, "step", rank=1), stop("SIGINT", 6, 1)],
        },
    }
    assert_as_never_stopped(run_cases(tmp_path, cases, num_ranks=2))
