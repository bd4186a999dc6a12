"""Every stage resumes bit for bit: weights, every logged number, every sample; alone and on ranks."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_shards import write_caption_tars

from llava_lite.train.saving.manifest import newest_complete_checkpoint

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
ANYRES = ["--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad"]
STAGES = {
    "projector": ["--tuning", "projector", "--version", "plain", *ANYRES],
    "full": ["--tuning", "full", "--group_by_modality_length", "True"],
    "lora": ["--tuning", "lora", "--lora_r", "4"],
    "moe": ["--tuning", "moe", "--num_experts", "2", "--group_by_modality_length", "True"],
    "packs": ["--tuning", "moe", "--num_experts", "2", "--packing", "tokens"],
    "crops": ["--tuning", "projector", "--version", "alpaca", "--image_aspect_ratio", "random_crop"],
}
# What a run has beside its stage: an evaluation with answers, shards in place of records, or features from a cache.
# A resumed run finds the features that the full run has made, or makes them again in a directory of its own.
BESIDE = ("", "evaluation", "shards", "features made before", "features made again")
# A crop is another one in every epoch, so its features are not cached; packs of shards have a test of their own.
WITHOUT = {("crops", "features made before"), ("crops", "features made again"), ("packs", "shards")}
# Tokens of a pack that make as many packs of the 22 records as there are micro-batches of 2 or of 1 of them.
PACK_TOKENS = {2: 145, 1: 95}


@pytest.fixture(scope="module")
def case(tmp_path_factory, toy_llm_dir, toy_tower_dir, toy_data):
    """Return a function: stage, workers, records a rank and micro-batch, ... -> a case of 12 steps in 2 epochs.

    Saved every 4, logged every 3; with attention dropout, and the last step of an epoch one record short.
    """
    llm = tmp_path_factory.mktemp("llm") / "llm"
    shutil.copytree(toy_llm_dir("llama"), llm)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    data, images = toy_data(num_records=22)
    held_out, _ = toy_data(num_records=6, seed=1)
    shards = tmp_path_factory.mktemp("shards")
    pattern = write_caption_tars(shards, [6, 4, 7, 5])
    common = {
        "model_name_or_path": llm,
        "vision_tower": toy_tower_dir("clip"),
        "mm_projector_type": "mlp2x_gelu",
        "data_path": data,
        "image_folder": images,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def make(stage, workers, batch_size, beside="", engine=(), resume_from=(8, 4), **others):
        own = {"dataloader_num_workers": workers, "per_device_train_batch_size": batch_size}
        more = {}
        if stage == "packs":
            own |= {"per_device_train_batch_size": 1, "packing_tokens": PACK_TOKENS[batch_size]}
        if beside == "evaluation":
            own |= {"eval_data_path": held_out, "eval_strategy": "steps", "eval_steps": 3}
            own |= {"num_eval_generations": 2, "eval_max_new_tokens": 4}
        if beside == "shards":
            own |= {"data_path": pattern, "image_folder": shards, "max_steps": 12, "shuffle_window": 4}
            # A stream cannot be grouped.
            own["group_by_modality_length"] = False
        if beside.startswith("features"):
            own["feature_cache"] = tmp_path_factory.mktemp("features")
        if beside == "features made again":
            more["feature_cache"] = tmp_path_factory.mktemp("features")
        argv = [*STAGES[stage], *as_flags(common | own), *engine]
        return {"argv": argv, "more": as_flags(more), "resume_from": resume_from, **others}

    return make


def as_flags(values):
    """Return the words of flags."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run_cases(directory, cases, launcher=(), num_ranks=1, timeout_s=1500):
    """Run resume_cases.py once over all cases; return the results of each rank."""
    for name, case in cases.items():
        case["output"] = str(directory / name)
    (directory / "cases.json").write_text(json.dumps(cases))
    files = [directory / "cases.json", directory / "results_RANK.json"]
    command = [*(launcher or [sys.executable]), HERE / "resume_cases.py", *files]
    with open(directory / "log.txt", "w") as log:
        done = subprocess.run(
            [str(word) for word in command],
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    assert done.returncode == 0, (directory / "log.txt").read_text()[-4000:]
    return [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(num_ranks)]


def environment():
    """Return the environment of a run on the CPU."""
    bin_directory = Path(sys.executable).parent
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **own, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}


def deepspeed_launcher(port):
    """Return the command that starts a script on 2 ranks of this machine."""
    return ["deepspeed", "--num_accelerators", "2", "--master_port", port]


def assert_equal_to_full(ranks, case):
    """Compare each resumed run of a case with the full one, on every rank."""
    for results in ranks:
        full = results[case]["full"]
        resumed = {name: found for name, found in results[case].items() if name.isdigit()}
        assert resumed
        for name, found in resumed.items():
            assert found["log"] == full["log"], f"from {name}"
            assert found["weights"] == full["weights"], f"from {name}"
            assert found["samples"] == [sample for sample in full["samples"] if sample[0] >= int(name)], f"from {name}"
            assert found["optimizer"] == full["optimizer"], f"from {name}"
            assert found["random state"] == full["random state"], f"from {name}"


def assert_opens_as_trained(directory, results, case):
    """Compare the weights of the final directory with those that the model had when training ended."""
    from llava_lite.model import LlavaLlamaForCausalLM

    cases = runpy.run_path(str(HERE / "resume_cases.py"))
    weights = dict(LlavaLlamaForCausalLM.from_pretrained(directory / case / "full").named_parameters())
    trained = results[case]["full"]["weights"]
    assert {name: cases["digest"](weights[name].detach()) for name in trained} == trained


def differences(ranks, case, name):
    """Return what a run with a guard taken out had otherwise than the full one."""
    found, full = ranks[0][case][name], ranks[0][case]["full"]
    samples = [sample for sample in full["samples"] if sample[0] >= int(name.split()[0])]
    pairs = {key: (found[key], samples if key == "samples" else full[key]) for key in found}
    return {key for key, (one, other) in pairs.items() if one != other}


# One process.


@pytest.fixture(scope="module")
def alone(case, tmp_path_factory):
    """Results of the stages in one process; 0 workers for some of them, 2 for the others; each beside something."""
    cases = {
        "projector": case("projector", 2, 2, "shards"),
        "full": case("full", 0, 2, "evaluation"),
        "lora": case("lora", 2, 2, "features made again"),
        "moe": case("moe", 0, 2, "features made before"),
        "packs": case("packs", 2, 2, "evaluation"),
        "crops": case("crops", 2, 2),
        "workers that stay": case("crops", 2, 2, "evaluation", ["--dataloader_persistent_workers", "True"]),
    }
    cases["full"]["broken"] = ["random state"]
    cases["moe"]["broken"] = ["counters of the log"]
    cases["crops"]["broken"] = ["epoch of the data set"]
    return run_cases(tmp_path_factory.mktemp("alone"), cases)


@pytest.mark.parametrize("stage", [*STAGES, "workers that stay"])
def test_a_stage_resumes_bit_for_bit(alone, stage):
    assert_equal_to_full(alone, stage)


def test_without_the_random_state_weights_and_losses_would_differ(alone):
    assert differences(alone, "full", "4 without random state") == {"weights", "log", "optimizer", "random state"}


def test_without_the_counters_the_next_line_of_the_log_would_differ(alone):
    assert differences(alone, "moe", "4 without counters of the log") == {"log"}


def test_without_the_epoch_the_crops_would_differ(alone):
    assert differences(alone, "crops", "8 without epoch of the data set") == {"weights", "log", "optimizer"}


@pytest.mark.slow
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_stage_resumes_bit_for_bit_with_workers_and_without(case, tmp_path, workers, beside):
    cases = {stage: case(stage, workers, 2, beside) for stage in STAGES if (stage, beside) not in WITHOUT}
    ranks = run_cases(tmp_path, cases)
    for stage in cases:
        assert_equal_to_full(ranks, stage)


# Two ranks.


@pytest.fixture(scope="module")
def two_ranks(case, tmp_path_factory):
    """Results of two stages on 2 ranks under ZeRO-2, and of a disk that is full for the second rank.

    The other stages, ZeRO-3 and both numbers of workers are in the slow tests.
    """
    zero2 = ["--deepspeed", str(ROOT / "zero2.json")]
    cases = {
        "full": case("full", 0, 1, "evaluation", zero2, [8], broken=["epoch of the sampler"]),
        "packs": case("packs", 2, 1, "features made again", zero2, [4]),
        "full disk": case("full", 0, 1, engine=zero2, full_disk_on=1),
    }
    return run_cases(tmp_path_factory.mktemp("ranks"), cases, deepspeed_launcher(29701), num_ranks=2)


@pytest.mark.parametrize("stage", ["full", "packs"])
def test_a_stage_resumes_bit_for_bit_on_two_ranks(two_ranks, stage):
    assert_equal_to_full(two_ranks, stage)


def test_without_the_epoch_of_the_sampler_two_ranks_would_see_other_samples(two_ranks):
    assert "samples" in differences(two_ranks, "full", "8 without epoch of the sampler")


def test_a_disk_that_is_full_for_one_rank_stops_both_and_leaves_the_checkpoint_before(two_ranks):
    for results in two_ranks:
        found = results["full disk"]["full disk"]
        assert "rank 1: " in found["error"]
        assert "rank 0: " not in found["error"]
        assert found["left"] == ["checkpoint-4"]
        assert found["newest"].endswith("checkpoint-4")


@pytest.mark.slow
@pytest.mark.parametrize(("bf16", "beside"), [("True", ""), *(("False", beside) for beside in BESIDE)])
@pytest.mark.parametrize("stage_of_zero", [0, 2, 3])
def test_all_stages_resume_bit_for_bit_under_zero(case, tmp_path, stage_of_zero, bf16, beside):
    config = json.loads((ROOT / f"zero{stage_of_zero or 2}.json").read_text())
    config["zero_optimization"]["stage"] = stage_of_zero
    (tmp_path / "zero.json").write_text(json.dumps(config))
    zero = ["--deepspeed", str(tmp_path / "zero.json"), "--bf16", bf16]
    cases = {
        f"{stage} {workers}": case(stage, workers, 1, beside, zero)
        for stage in STAGES
        for workers in (0, 2)
        if (stage, beside) not in WITHOUT
    }
    ranks = run_cases(tmp_path, cases, deepspeed_launcher(29702), num_ranks=2, timeout_s=3000)
    for name in cases:
        assert_equal_to_full(ranks, name)
        if not name.startswith("lora"):
            assert_opens_as_trained(tmp_path, ranks[0], name)


@pytest.mark.slow
@pytest.mark.parametrize("beside", BESIDE)
def test_all_stages_resume_bit_for_bit_under_ddp(case, tmp_path, beside):
    cases = {stage: case(stage, 2, 1, beside) for stage in STAGES if (stage, beside) not in WITHOUT}
    # A stream has an order of its own.
    has_sampler = beside != "shards"
    if has_sampler:
        cases["packs"]["broken"] = ["epoch of the sampler"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29703"]
    ranks = run_cases(tmp_path, cases, launcher, num_ranks=2)
    for stage in cases:
        assert_equal_to_full(ranks, stage)
    if has_sampler:
        assert "samples" in differences(ranks, "packs", "8 without epoch of the sampler")


# The terminal sends Ctrl-C and its end to launcher, ranks and workers; torchrun's ranks are out of its reach, and get
# it from their launcher. DeepSpeed's sends SIGTERM after it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("deepspeed", signal.SIGTERM),
        ("deepspeed", signal.SIGINT),
        ("deepspeed", signal.SIGHUP),
        ("torchrun", signal.SIGINT),
        ("torchrun", signal.SIGTERM),
    ],
)
def test_a_signal_to_launcher_ranks_and_workers_saves_on_both_ranks(case, tmp_path, launcher, number):
    output = tmp_path / "out"
    argv = [*case("full", 2, 1)["argv"], "--output_dir", output, "--num_train_epochs", 500, "--save_steps", 100000]
    if launcher == "deepspeed":
        argv, start = [*argv, "--deepspeed", ROOT / "zero2.json"], deepspeed_launcher(29704)
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29704"]
    command = [str(word) for word in (*start, ROOT / "llava_lite/train/train_mem.py", *argv)]
    # The first of DeepSpeed's two launchers dies of SIGTERM and passes nothing on.
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, env=environment(), start_new_session=True, **streams)
    try:
        next(line for line in run.stdout if "'loss'" in line)
        os.killpg(run.pid, number)
        log, _ = run.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert log.count("is saved, leaving with code 75") == 2
    assert newest_complete_checkpoint(output) is not None
