"""A record that breaks on one rank is left out on both, and both resume bit for bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_shards import caption_files, tar_files, write_caption_tars

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]


def rot(path):
    """Damage the middle of a PNG."""
    data = bytearray(Path(path).read_bytes())
    start = data.find(b"IDAT") + 6
    data[start : start + 20] = bytes(20)
    Path(path).write_bytes(data)


def log_of(results):
    """Return the lines of a log without what an evaluation took."""
    clock = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in results["log"]]


def launched(command, **options):
    """Run a command on 2 ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, *map(str, command)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, **options)


@pytest.fixture
def common(toy_llm_dir, toy_tower_dir, monkeypatch, tmp_path):
    """The flags of all cases."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    return (
        f"--model_name_or_path {toy_llm_dir('llama')} --vision_tower {toy_tower_dir('clip')} --tuning full "
        "--mm_projector_type mlp2x_gelu --logging_steps 1 --save_strategy steps --save_steps 4 --learning_rate 0.01 "
        "--use_cpu True --disable_tqdm True --bad_record skip --max_bad_fraction 0.5 --per_device_train_batch_size 1"
    )


@pytest.mark.slow
def test_a_record_that_breaks_on_one_rank_is_left_out_on_both(common, toy_data, tmp_path):
    path, images = toy_data(tmp_path / "data", num_records=22, text_only_every=0)
    for number in (4, 10, 11):
        rot(f"{images}/{number}.png")
    shards = write_caption_tars(tmp_path / "shards", [9, 5, 7])
    tar_files(tmp_path / "shards" / "3.tar", [("7.png", b"x"), ("7.txt", b"a cat"), *caption_files(50)])
    held_out, _ = toy_data(tmp_path / "held_out", num_records=9, text_only_every=0, num_turns=1)
    records = f"{common} --data_path {path} --image_folder {images} --num_train_epochs 2"
    ways = {
        "zero3": "--deepspeed zero3.json --gradient_accumulation_steps 2 --dataloader_num_workers 2",
        "groups": "--deepspeed zero2.json --group_by_modality_length True",
        "packs": "--deepspeed zero2.json --packing tokens --packing_tokens 130 --max_steps 12",
        "features": f"--deepspeed zero3.json --feature_cache {tmp_path / 'features'}",
        # The records of this file lie in the same directory: its image 4 is broken too.
        # A save follows an evaluation at once: weights that were gathered ahead for it must be back.
        "evaluation": f"--deepspeed zero3.json --eval_data_path {held_out} --eval_strategy steps --eval_steps 4 "
        "--num_eval_generations 2 --eval_max_new_tokens 2 --per_device_eval_batch_size 1",
    }
    cases = {name: {"argv": f"{records} {more}".split(), "resume_from": [4, 8]} for name, more in ways.items()}
    stream = f"{common} --data_path {shards} --max_steps 12 --dataloader_num_workers 1 --shuffle_window 3"
    cases["stream"] = {"argv": f"{stream} --deepspeed zero2.json".split(), "resume_from": [4, 8]}
    for name, case in cases.items():
        case["output"] = str(tmp_path / name)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = launched([HERE / "resume_cases.py", tmp_path / "cases.json", tmp_path / "results_RANK.json"], check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    ranks = [json.loads((tmp_path / f"results_{rank}.json").read_text()) for rank in range(2)]
    for results in ranks:
        for name in cases:
            for step in ("4", "8"):
                found, full = results[name][step], results[name]["full"]
                assert log_of(found) == log_of(full), f"{name} from {step}"
                assert found["weights"] == full["weights"], f"{name} from {step}"
                assert found["samples"] == full["samples"][-len(found["samples"]) :]
    for name in ways:
        lines = (tmp_path / name / "full" / "skipped_records.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["id"] for line in lines) == ["toy_004", "toy_010", "toy_011"]
    lines = (tmp_path / "evaluation" / "full" / "skipped_eval_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["toy_004"]


@pytest.mark.slow
def test_without_skip_both_ranks_end_at_once_with_the_record(common, toy_data, tmp_path):
    path, images = toy_data(tmp_path / "data", num_records=22, text_only_every=0)
    rot(f"{images}/10.png")
    flags = f"{common} --data_path {path} --image_folder {images} --num_train_epochs 1 --bad_record raise"
    flags += f" --output_dir {tmp_path / 'out'} --deepspeed zero2.json --dataloader_num_workers 1"
    done = launched(["--module", "llava_lite.train.train", *flags.split()], check=False)
    assert done.returncode != 0
    assert f"record 'toy_010' (toy.json[10]): cannot use the image '{images}/10.png'" in done.stdout + done.stderr
