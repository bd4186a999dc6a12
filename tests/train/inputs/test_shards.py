"""Stages that train on shards: full and resumed alike, on one rank and on two; what shards cannot do is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_shards import caption_files, conversation_row, tar_files, write_caption_tars, write_parquet

from llava_lite.train.train import train

HERE = Path(__file__).parents[1]


@pytest.fixture
def shard_flags(stage_flags, tmp_path):
    """Return a function: output directory and more flags -> flags of stage 1, 8 steps of 2 micro-batches of 2."""
    pattern = write_caption_tars(tmp_path / "shards", [9, 5, 7, 8, 6])

    def make(output, *more):
        common = "--max_steps 8 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --shuffle_window 4"
        return stage_flags("projector", output, *common.split(), *more, data=(pattern, tmp_path))

    return make


def logged(trainer):
    """Return the losses and norms of a run."""
    return [(line["step"], line["loss"], line["epoch"]) for line in trainer.state.log_history if "loss" in line]


def test_a_run_on_shards_resumes_as_if_it_had_not_stopped(shard_flags, tmp_path):
    flags = shard_flags(tmp_path / "full", "--save_strategy", "steps", "--save_steps", "3")
    full = train(flags)
    resumed = train(
        [
            *flags,
            "--output_dir",
            str(tmp_path / "again"),
            "--resume_from_checkpoint",
            f"{full.args.output_dir}/checkpoint-3",
        ]
    )
    assert len(logged(full)) == 8
    assert logged(resumed) == logged(full)
    for ours, theirs in zip(full.model.parameters(), resumed.model.parameters(), strict=True):
        assert ours.equal(theirs)
    card = (tmp_path / "full" / "README.md").read_text()
    assert "| 00000.tar to 00004.tar | 32 |" in card
    with pytest.raises(ValueError, match="shuffle_window was 4, is 5"):
        train([*flags, "--shuffle_window", "5", "--resume_from_checkpoint", "True"])


@pytest.mark.parametrize("more", [(), ("--max_steps", "4")])
def test_a_finished_run_that_is_started_again_trains_no_more(more, shard_flags, tmp_path):
    flags = shard_flags(tmp_path / "full", "--save_strategy", "steps", "--save_steps", "4")
    full = train(flags)
    again = train([*flags, *more])
    assert again.state.global_step == 8
    assert logged(again) == logged(full)
    for ours, theirs in zip(full.model.parameters(), again.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_packs_of_tokens_come_from_shards_too(shard_flags, tmp_path):
    packs = "--packing tokens --packing_tokens 90 --per_device_train_batch_size 1"
    assert len(logged(train(shard_flags(tmp_path / "out", *packs.split())))) == 8


def test_records_left_out_are_in_the_skipped_log_of_their_rank(shard_flags, tmp_path):
    tar_files(tmp_path / "shards" / "00002.tar", [*caption_files(1), ("7.jpg", b"x"), ("7.txt", b"a cat")])
    trainer = train(shard_flags(tmp_path / "out", "--bad_record", "skip"))
    lines = (tmp_path / "out" / "skipped_records-rank00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"7"}
    assert len(logged(trainer)) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "-1"], "--max_steps is needed with shards"),
        (["--group_by_modality_length", "True", "--packing", "none"], "--group_by_modality_length True needs records"),
        (["--eval_split", "2"], "--eval_split 2.0 needs records .* with --eval_data_path"),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy sequential needs records .* drop it"),
        (["--feature_cache", "features"], "--feature_cache features needs records"),
        (["--ignore_data_skip", "True"], "--ignore_data_skip True with shards: .* drop it"),
        (["--auto_find_batch_size", "True"], "--auto_find_batch_size True with shards: .* drop it"),
        (["--eval_data_path", "held_out.tar"], "--eval_data_path held_out.tar: shards are for training only"),
    ],
)
def test_what_shards_cannot_do_is_refused_first(flags, message, shard_flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        train([*shard_flags(tmp_path / "out"), "--model_name_or_path", "/nowhere", *flags])


@pytest.mark.slow
def test_two_ranks_with_workers_resume_bit_for_bit_on_records_of_their_own(toy_llm_dir, toy_tower_dir, tmp_path):
    directory = tmp_path / "shards"
    write_caption_tars(directory, [9, 5, 7])
    write_parquet(
        directory / "conversations.parquet", [conversation_row(n) for n in range(100, 111)], row_group_size=4
    )
    argv = (
        f"--model_name_or_path {toy_llm_dir('llama')} --vision_tower {toy_tower_dir('clip')} --tuning full "
        f"--mm_projector_type mlp2x_gelu --data_path {directory} --max_steps 12 --logging_steps 3 "
        "--save_strategy steps --save_steps 4 --gradient_accumulation_steps 2 --per_device_train_batch_size 1 "
        "--dataloader_num_workers 2 "
        "--shuffle_window 3 --learning_rate 0.01 --use_cpu True --disable_tqdm True --deepspeed zero2.json"
    )
    cases = {"stream": {"argv": argv.split(), "output": str(tmp_path / "out"), "resume_from": [4, 8]}}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = HERE.parents[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(root), "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, str(HERE / "resume_cases.py")]
    command += [str(tmp_path / "cases.json"), str(tmp_path / "results_RANK.json")]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    ranks = [json.loads((tmp_path / f"results_{rank}.json").read_text())["stream"] for rank in range(2)]
    for results in ranks:
        for step, num_left in (("4", 16), ("8", 8)):
            assert results[step]["samples"] == results["full"]["samples"][-num_left:]
            assert results[step]["log"] == results["full"]["log"]
            assert results[step]["weights"] == results["full"]["weights"]
    first, second = ({sample for _, batch in results["full"]["samples"][:8] for sample in batch} for results in ranks)
    assert len(first) == len(second) == 8
    assert not first & second
