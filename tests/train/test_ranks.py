"""Two ranks train what one process trains: DDP, ZeRO-2 and ZeRO-3, dense and MoE, images and text mixed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_launcher import launch
from transformers import AutoModelForCausalLM

from llava_lite import load
from llava_lite.train.train import train

ROOT = Path(__file__).parents[2]
ENGINES = {"ddp": [], "zero2": ["--deepspeed", "zero2.json"], "zero3": ["--deepspeed", "zero3.json"]}
# SGD: Adam would blow rounding up to full steps. The balance loss is a mean over micro-batches, so it is left out
# where runs that cut them differently are compared.
COMMON = "--optim=sgd --learning_rate=0.1 --max_grad_norm=0 --max_steps=4 --gradient_checkpointing=True"
KINDS = {
    "grouped": ("full", "--group_by_modality_length=True"),
    "mixed": ("full", "--train_sampling_strategy=random --seed=3"),
    "accumulated": ("full", "--gradient_accumulation_steps=2 --group_by_modality_length=True"),
    "evaluated": (
        "full",
        "--eval_split=5 --eval_strategy=steps --eval_steps=2 --num_eval_generations=1 --eval_max_new_tokens=3",
    ),
    "experts": ("moe", "--router_aux_loss_coef=0 --train_sampling_strategy=random --seed=3"),
    "lora": ("lora", "--lora_dropout=0 --group_by_modality_length=True"),
    # A third of these packs are of text alone.
    "packs": ("moe", "--router_aux_loss_coef=0 --packing=tokens --packing_tokens=145"),
}
# Words of the records, as one token each from here on, and those around images.
NEW = "--new_tokens square circles --mm_use_im_start_end=True --save_strategy=steps --save_steps=2"
WITH_NEW_WORDS = {
    "moe": ("moe", f"--router_aux_loss_coef=0 --group_by_modality_length=True {NEW}"),
    "lora": ("lora", f"--lora_dropout=0 --group_by_modality_length=True {NEW}"),
    "projector": ("projector", f"--version=v1 --group_by_modality_length=True {NEW}"),
}


@pytest.fixture
def flags_of(stage_flags, toy_data, tmp_path):
    data = toy_data(tmp_path / "data", num_records=24, text_only_every=3)
    # Given, since ZeRO-3 draws a new connector otherwise than one process does.
    adapter = tmp_path / "mm_projector.bin"
    torch.manual_seed(0)
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save({f"model.mm_projector.{name}": 0.2 * torch.randn(shape) for name, shape in shapes.items()}, adapter)

    def make(kind, out, batch):
        stage, more = {**KINDS, **WITH_NEW_WORDS}[kind]
        more = f"{more} --pretrain_mm_mlp_adapter={adapter}"
        if kind == "packs":
            # Of two ranks a pack each, or of one process two in turn.
            more, batch = f"{more} --gradient_accumulation_steps={batch // 2}", 1
        return [
            *stage_flags(stage, out, data=data),
            *COMMON.split(),
            *more.split(),
            f"--per_device_train_batch_size={batch}",
        ]

    return make


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(flags_of, tmp_path):
    cases = [
        {"name": f"{engine}_{kind}", "argv": [*flags_of(kind, tmp_path / f"{engine}_{kind}", 2), *more]}
        for engine, more in ENGINES.items()
        for kind in KINDS
        # The first matrices of LoRA are drawn, and otherwise under ZeRO-3.
        if (engine, kind) != ("zero3", "lora")
    ]
    cases += [
        {
            "name": f"{engine}_nan",
            "argv": [*flags_of("grouped", tmp_path / f"{engine}_nan", 2), *more],
            "nan_on_rank": 1,
        }
        for engine, more in ENGINES.items()
    ]
    results = launch(cases, tmp_path)
    for kind in KINDS:
        # On ranks packed, alone with padding.
        padded = [] if kind == "packs" else ["--packing=none"]
        log = train([*flags_of(kind, tmp_path / f"one_{kind}", 4), *padded]).state.log_history
        expected = {key: [line[key] for line in log if key in line] for key in ("loss", "eval_loss")}
        for engine in ENGINES:
            for result in results.get(f"{engine}_{kind}", ()):
                assert "error" not in result, f"{engine} {kind}: {result}"
                for key, values in expected.items():
                    assert result[key] == pytest.approx(values, rel=1e-5), f"{engine} {kind} {key}"
    for engine in ENGINES:
        for result in results[f"{engine}_nan"]:
            assert "NonFiniteError: step 1: rank 1: loss nan for samples ['toy_" in result["error"]
        assert not (tmp_path / f"{engine}_nan/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped", "experts"])
def test_under_zero3_the_loss_at_supervised_positions_trains_what_all_logits_train(flags_of, tmp_path, kind):
    # The last flag of a name counts.
    ways = {"supervised": [], "all": ["--plain_paths", "loss"]}
    cases = []
    for way, more in ways.items():
        for checkpointing in (True, False):
            name = f"{way}_{checkpointing}"
            argv = [*flags_of(kind, tmp_path / name, 2), *ENGINES["zero3"], *more]
            cases.append({"name": name, "argv": [*argv, f"--gradient_checkpointing={checkpointing}"]})
    results = launch(cases, tmp_path)
    expected = results["all_False"][0]["loss"]
    assert len(expected) == 4
    for name, of_ranks in results.items():
        for result in of_ranks:
            assert result.get("loss") == pytest.approx(expected, rel=1e-5), f"{name}: {result}"


@pytest.mark.slow
def test_two_ranks_train_the_new_tokens_as_one_process_does(flags_of, toy_llm_dir, tmp_path):
    def of(kind, name, *more):
        return [*flags_of(kind, tmp_path / name, 2), *more]

    # The first matrices of LoRA are drawn, and otherwise under ZeRO-3.
    pairs = [(engine, kind) for engine in ENGINES for kind in WITH_NEW_WORDS if (engine, kind) != ("zero3", "lora")]
    cases = [{"name": f"{e}_{k}", "argv": of(k, f"{e}_{k}", *ENGINES[e])} for e, k in pairs]
    # Once more from the middle: the last checkpoint is taken away before.
    again = [("ddp", "moe"), ("zero2", "lora"), ("zero3", "moe")]
    cases += [
        {
            "name": f"{e}_{k}_again",
            "argv": of(k, f"{e}_{k}_again", *ENGINES[e], f"--resume_from_checkpoint={tmp_path}/{e}_{k}/checkpoint-2"),
        }
        for e, k in again
    ]
    # One engine after the other: a process that has begun DeepSpeed stays with it.
    results = launch(sorted(cases, key=lambda case: case["name"]), tmp_path)
    assert {name: each for name, result in results.items() for each in result if "error" in each} == {}
    hf = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama")).state_dict()
    for kind in WITH_NEW_WORDS:
        log = train([*flags_of(kind, tmp_path / kind, 4), "--packing=none"]).state.log_history
        losses = [line["loss"] for line in log if "loss" in line]
        expected = load(tmp_path / kind, device="cpu")[0].state_dict()
        for engine in (e for e, k in pairs if k == kind):
            for result in results[f"{engine}_{kind}"]:
                assert result["loss"] == pytest.approx(losses, rel=1e-5), f"{engine} {kind}"
            found = load(tmp_path / f"{engine}_{kind}", device="cpu")[0].state_dict()
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                num_old = len(hf[name])
                assert len(found[name]) == num_old + 4
                assert torch.equal(found[name][:num_old], hf[name]), f"{engine} {kind}"
                torch.testing.assert_close(found[name][num_old:], expected[name][num_old:], rtol=1e-4, atol=1e-5)
            if (engine, kind) in again:
                after = load(tmp_path / f"{engine}_{kind}_again", device="cpu")[0].state_dict()
                assert all(torch.equal(weight, found[name]) for name, weight in after.items()), f"{engine} {kind}"


def start_ranks(argv, directory):
    """Start the command line on two ranks; return their processes, which write to rank0.log and rank1.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "llava_lite.train.train", *argv]
    ranks = []
    for rank in ("0", "1"):
        with open(directory / f"rank{rank}.log", "w") as log:
            env = common | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def get_codes(ranks, directory, timeout_s=600):
    """Return the exit codes of both ranks and what they wrote."""
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, "".join((directory / f"rank{rank}.log").read_text() for rank in "01")


@pytest.mark.slow
def test_ranks_end_with_the_documented_codes_and_no_thread_aborts(stage_flags, tmp_path):
    flags = [*stage_flags("full", tmp_path / "run"), "--deepspeed", "zero2.json", "--save_steps", "1000"]
    few = [*flags, "--save_strategy", "steps", "--max_steps"]
    # The second time there is nothing to train.
    for _ in range(2):
        codes, text = get_codes(start_ranks([*few, "1"], tmp_path), tmp_path)
        assert codes == [0, 0], text
        assert "terminate called" not in text
    assert "nothing was trained" in text
    codes, text = get_codes(start_ranks([*few, "2", "--seed", "7"], tmp_path), tmp_path)
    assert codes == [1, 1], text
    assert text.count("cannot be resumed exactly") == 1
    again = [*few, "100000", "--output_dir", str(tmp_path / "stopped")]
    ranks = start_ranks(again, tmp_path)
    metrics, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    ranks[1].send_signal(signal.SIGTERM)
    codes, text = get_codes(ranks, tmp_path)
    assert codes == [75, 75], text
    assert "terminate called" not in text
    assert list((tmp_path / "stopped").glob("checkpoint-*"))
