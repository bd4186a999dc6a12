"""A rank or a loader worker of a real run hangs or dies: the run ends, and says with what."""

import re
from pathlib import Path

import pytest


def get_messages(logs):
    """Return the lines that are for people."""
    return [line for log in logs for line in log.splitlines() if line.startswith("llava-lite train")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [[], ["--deepspeed", "zero2.json"], ["--deepspeed", "zero3.json"]], ids=["ddp", "zero2", "zero3"]
)
def test_a_rank_that_hangs_in_a_step_ends_the_run_by_ddp_timeout(engine, stage_flags, run_with_fault, tmp_path):
    flags = stage_flags("full", tmp_path / "out", "--max_steps", 4, "--ddp_timeout", 15, *engine)
    shared = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    codes, logs = run_with_fault("rank_hangs", flags, num_ranks=2)
    assert codes == [1, 1]
    (said,) = get_messages(logs)
    assert re.search(
        r"rank 1 \(host \S+, pid \d+\) hangs at 'step 2: forward of records \['toy_\d+'.*fault_worker\.py:\d+ in "
        r"hang_in_step: time\.sleep\(10_000\)\. None of 2 ranks has made progress for --ddp_timeout 15 seconds",
        said,
    )
    assert "Traceback" not in "".join(logs)
    assert set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) <= shared


# Of a rank that is healthy: under ZeRO-3 it waits for weights, in another part of DeepSpeed each.
@pytest.mark.slow
@pytest.mark.parametrize("part", ["answers", "evaluation", "backward", "save"])
def test_a_rank_that_waits_for_weights_is_not_blamed_for_the_one_that_hangs(
    part, stage_flags, toy_data, run_with_fault, tmp_path
):
    eval_data, _ = toy_data(tmp_path / "eval", num_records=4)
    more = ["--max_steps", 3, "--ddp_timeout", 15, "--deepspeed", "zero3.json"]
    if part == "save":
        more += ["--save_strategy", "steps", "--save_steps", 1]
    if part in ("answers", "evaluation"):
        more += ["--eval_data_path", eval_data, "--eval_strategy", "steps", "--eval_steps", 1]
        more += ["--num_eval_generations", 1, "--eval_max_new_tokens", 4]
    codes, logs = run_with_fault(f"{part}_hangs", stage_flags("full", tmp_path / "out", *more), num_ranks=2)
    assert codes == [1, 1]
    (said,) = get_messages(logs)
    assert re.search(
        r": rank 1 \(host \S+, pid \d+\) hangs at '.*fault_worker\.py:\d+ in .*: .*time\.sleep\(10_000\)", said
    )
    assert "rank 0 (" not in said
    assert "Traceback" not in "".join(logs)


@pytest.mark.slow
def test_a_loader_worker_that_hangs_ends_the_run_and_is_named_with_its_record(stage_flags, run_with_fault, tmp_path):
    more = ["--max_steps", 8, "--ddp_timeout", 15, "--dataloader_num_workers", 2, "--feature_cache", "off"]
    codes, logs = run_with_fault("worker_hangs", stage_flags("full", tmp_path / "out", *more))
    assert codes == [1]
    (said,) = get_messages(logs)
    assert re.search(
        r"the data loader has given no batch for \d+ s at 'step \d: waiting for a batch of the loader': worker \d "
        r"\(pid \d+\) has been reading record 'toy_005' \(toy\.json\[5\]\), image '5\.png' for \d+ s\.",
        said,
    )


@pytest.mark.slow
def test_a_loader_worker_that_is_killed_is_named_with_its_record(stage_flags, run_with_fault, tmp_path):
    more = ["--max_steps", 8, "--dataloader_num_workers", 2, "--feature_cache", "off"]
    codes, logs = run_with_fault("worker_dies", stage_flags("full", tmp_path / "out", *more))
    assert codes == [1]
    (said,) = get_messages(logs)
    assert re.search(
        r"worker \d \(pid \d+\) of the data loader was killed or crashed; it was reading record 'toy_005' \(toy\.json",
        said,
    )
