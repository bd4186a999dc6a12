"""Measure MFU, memory and speed at the widths of a 7B model on one GPU in 8 minutes: ours and transformers'.

    python -m benchmarks.cuda_suite --json benchmarks/results/cuda_suite.json    on a GPU; needs no `datasets`
    python -m benchmarks --report                                                the table with its figures
    python -m benchmarks.cuda_suite --toy                                        the same code at toy widths on a CPU

Random weights in bfloat16, as are gradients and AdamW's states, for all rivals. Two such models do not fit on one GPU,
so the rivals of a stage run one after another, each for some steps; the spread of each rival's steps is reported.
Stage 3 has half of the layers for all rivals, since the optimizer states of all its experts exceed one GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.rivals import choose_what_trains, hf_model, make_optimizer, our_model
from benchmarks.timing import write_result
from benchmarks.workload import IGNORE_INDEX, SIZES, Size, batches, count_tokens, padded

WIDTHS_7B = Size(4096, 11008, 32, 32, image_size=336, vision_width=1024, vision_layers=24)
SAMPLES_A_STEP = {1: 32, 2: 16, 3: 16}
# In the order of measurement, in case the time runs out.
PARTS = ("stage 2", "stage 1", "stage 3", "moe_layer", "generation")
WARMUP, ROUNDS = 2, 6


def size_of(stage: int, toy: bool) -> Size:
    """Return the widths of a stage."""
    if toy:
        return SIZES["toy"]
    return replace(WIDTHS_7B, batch_size=SAMPLES_A_STEP[stage], num_layers=16 if stage == 3 else 32)


def get_rivals(stage: int) -> dict[str, dict]:
    """Return {name: options of Rival}; transformers gets the fastest attention that is installed."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    theirs = {"attn_implementation": "flash_attention_2" if has_flash else "sdpa"}
    if stage == 3:
        theirs["experts"] = "grouped_mm"
    return {
        "ours": {},
        "transformers": {"hf_options": theirs},
        "transformers +ckpt": {"hf_options": theirs, "checkpointing": True},
        "ours +ckpt": {"checkpointing": True},
    }


class Rival:
    """A model that trains on a device: ours, or with `hf_options` (of `hf_model`) transformers'."""

    def __init__(self, size: Size, stage: int, device: str, hf_options=None, checkpointing=False):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device, self.is_hf = device, hf_options is not None
        with torch.device(device):
            build = hf_model if self.is_hf else our_model
            self.model = build(size, stage, dtype=dtype, **(hf_options or {}))
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.image_id = size.vocab_size - 1
        self.parameters = choose_what_trains(self.model, stage)
        self.optimizer = make_optimizer(self.parameters, size)
        self.dtype = dtype

    def collate(self, examples) -> dict:
        """Return the batch on the device: padded for transformers, packed into one sequence for ours."""
        if self.is_hf:
            batch = padded(examples, self.image_id)
        else:
            from llava_lite.data.collator import PackedCollator

            batch = PackedCollator()(examples)
            del batch["sample_ids"]
        moved = {}
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.device, self.dtype if value.is_floating_point() else None)
            moved[key] = value
        return moved

    def step(self, examples) -> tuple[float, float]:
        """Return the seconds of a step, collation included, and its loss."""
        wait(self.device)
        start_s = time.perf_counter()
        output = self.model(**self.collate(examples), use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.device)
        language = getattr(output, "lm_loss", None)
        return time.perf_counter() - start_s, (output.loss if language is None else language).item()


def wait(device):
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def allocated_bytes(device, peak=False) -> int | None:
    """Return the bytes that torch has allocated on the device, now or at the peak; None on a CPU."""
    if device != "cuda":
        return None
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def free(device):
    """Free unused memory and reset its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_rival(size, stage, device, rounds, options) -> dict:
    """Return a rival's tokens per second and memory, or {"out_of_memory" or "failed": the message}."""
    free(device)
    try:
        return _measure(Rival(size, stage, device, **options), size, stage, device, rounds)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except Exception as error:
        # The other rivals run nevertheless.
        return {"failed": traceback.format_exception_only(error)[-1].strip().splitlines()[-1]}


def _measure(rival, size, stage, device, rounds):
    loaded_bytes = allocated_bytes(device)
    schedule = batches(size, stage, 2)
    per_token_s, losses = [], []
    for turn in range(-WARMUP, rounds):
        examples = schedule[turn % len(schedule)]
        seconds, loss = rival.step(examples)
        losses.append(loss)
        if turn >= 0:
            per_token_s.append(seconds / count_tokens(examples))
    rate = 1 / statistics.median(per_token_s)
    figures = {
        "tokens_per_s": rate,
        "tokens_per_s_range": [1 / max(per_token_s), 1 / min(per_token_s)],
        "samples_per_s": rate * size.batch_size / (sum(map(count_tokens, schedule)) / len(schedule)),
        "first_loss": losses[0],
    }
    if loaded_bytes is not None:
        figures["loaded_bytes"], figures["peak_bytes"] = loaded_bytes, allocated_bytes(device, peak=True)
    return figures


def add_mfu(rivals: dict, size: Size, stage: int, device: str) -> dict:
    """Add each rival's MFU, by the flops of our model's step (see train/monitor/throughput.py) for all of them."""
    from llava_lite.train.monitor.throughput import peak_flops, step_flops

    with torch.device("meta"):
        model = our_model(size, stage, attn_implementation="sdpa", draws=False)
    choose_what_trains(model, stage)
    examples = [example for batch in batches(size, stage, 2) for example in batch]
    supervised = sum(int((example["labels"][1:] != IGNORE_INDEX).sum()) for example in examples)
    tokens = count_tokens(examples)
    per_token = step_flops(model).of_batch(tokens, supervised, len(examples)) / tokens
    peak = peak_flops(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
    for one in rivals.values():
        if "tokens_per_s" in one:
            one["mfu"] = one["tokens_per_s"] * per_token / peak
    return {"flops_per_token": per_token, "peak_flops": peak, "tokens_per_sample": tokens / len(examples)}


def measure_stage(stage: int, device: str, toy: bool, deadline_s: float):
    """Yield the figures of a stage after each of its rivals; those for which no time is left are skipped."""
    size, rivals = size_of(stage, toy), {}
    for name, options in get_rivals(stage).items():
        # Recomputing is for models that do not fit otherwise.
        if name == "ours +ckpt" and "out_of_memory" not in rivals["ours"] and not toy:
            continue
        if time.monotonic() > deadline_s:
            rivals[name] = {"skipped": "no time left"}
        else:
            rivals[name] = measure_rival(size, stage, device, 1 if toy else ROUNDS, options)
        print(f"stage {stage}, {name}: {rivals[name]}", flush=True)
        free(device)
        yield compare(rivals, size, stage, device)


def compare(rivals: dict, size: Size, stage: int, device: str) -> dict:
    """Return rivals with MFU, the fastest of ours and of transformers' runs, and the ratio of the two."""
    result = {"rivals": rivals} | add_mfu(rivals, size, stage, device)
    rates = {name: one["tokens_per_s"] for name, one in rivals.items() if "tokens_per_s" in one}
    ours = [name for name in rates if name.startswith("ours")]
    theirs = [name for name in rates if name.startswith("transformers")]
    if ours:
        result["fastest_ours"] = max(ours, key=rates.get)
    if ours and theirs:
        result["fastest_transformers"] = max(theirs, key=rates.get)
        result["ratio"] = rates[result["fastest_ours"]] / rates[result["fastest_transformers"]]
    return result


def measure_apart(part: str, toy: bool, left_s: float, file: str) -> dict:
    """Return the figures of a stage from its own process, which adds them to the report in `file`."""
    # Half of the time is left for the parts that follow; main takes half a minute off.
    minutes = str((0.5 * left_s + 30) / 60)
    flags = ["--here", "--parts", part, "--json", file, "--minutes", minutes, *(["--toy"] if toy else [])]
    ended = call(["benchmarks.cuda_suite", *flags], left_s)
    return json.loads(Path(file).read_text())["results"].get(part, {}) | ended


def measure_module(name: str, toy: bool, timeout_s: float) -> dict:
    """Return the report of another benchmark, which uses 7B widths where there is a GPU."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.json"
        # A process of generation starts for minutes at these widths.
        flags = ["--quick"] if toy else ["--rounds", "1"] if name == "generation" else []
        ended = call([f"benchmarks.{name}", "--json", str(file), *flags], timeout_s)
        return (json.loads(file.read_text())["results"] if file.exists() else {}) | ended


def call(command: list[str], timeout_s: float) -> dict:
    """Run a module in its own process; return {} or, under "skipped" or "failed", why it did not succeed."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment, "check": False}
    try:
        done = subprocess.run([sys.executable, "-m", *command], timeout=max(timeout_s, 1), **options)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done within {timeout_s:.0f} s"}
    return {"failed": done.stderr[-2000:]} if done.returncode else {}


def main(argv=None) -> dict:
    """Measure the parts until the time is over, print, and return what is written to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--toy", action="store_true", help="toy widths on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--here", action="store_true", help="one stage in this process, written after each rival")
    args = parser.parse_args(argv)
    if not args.toy and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --toy runs the same code on the CPU.")
    device = "cpu" if args.toy else "cuda"
    # Half a minute is left for the last rival to end in.
    end_s = time.monotonic() + 60 * args.minutes - 30
    settings = {"toy": args.toy, "quick": args.toy}
    if args.here:
        (part,) = args.parts
        results = json.loads(Path(args.json).read_text())["results"]
        for found in measure_stage(int(part.split()[1]), device, args.toy, end_s):
            results[part] = found
            report = write_result("cuda_suite", results, args.json, **settings)
        return report
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        file = args.json or str(Path(directory) / "suite.json")
        report = write_result("cuda_suite", results, file, **settings)
        for part in (part for part in PARTS if part in args.parts):
            left_s = end_s - time.monotonic()
            if left_s < 0:
                results[part] = {"skipped": "no time left"}
            elif part.startswith("stage"):
                results[part] = measure_apart(part, args.toy, left_s, file)
            else:
                results[part] = measure_module(part, args.toy, left_s)
            show(part, results[part])
            report = write_result("cuda_suite", results, file, **settings)
    return report


def show(part: str, result: dict) -> None:
    """Print a part."""
    print(part, {key: value for key, value in result.items() if key != "rivals"})
    for name, one in result.get("rivals", {}).items():
        with contextlib.suppress(KeyError):
            peak = f"{one['peak_bytes'] / 2**30:7.1f} GiB" if "peak_bytes" in one else ""
            print(f"  {name:14}{one['tokens_per_s']:10.0f} tokens/s  MFU {100 * one['mfu']:5.1f}%  {peak}", flush=True)


if __name__ == "__main__":
    main()
