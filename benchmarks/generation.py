"""Turn one prompt with an image into new tokens, greedily: llava-lite and Hugging Face's transformers, same weights.

    python -m benchmarks.generation [--quick] [--json FILE] [--rounds N] [--threads N]

Each runner works alone in its own process and warms up; processes follow each other in random order. On a CPU size S,
on a GPU 7B widths in bfloat16 with random weights. A call with one new token is the time to the first token; the rest
of the time over the rest of the tokens is a decode step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.alone import get_samples, run_alone, run_rounds
from benchmarks.rivals import hf_model, our_model
from benchmarks.table import BY_TORCH
from benchmarks.timing import arguments, summary, write_result
from benchmarks.workload import BOS, SIZES, Size

OURS, TRANSFORMERS = "llava-lite", "transformers"
SEVEN_B = Size(4096, 11008, 32, 32, image_size=336, vision_width=1024, vision_layers=24)
# Tokens of the prompt besides the image's; 306 in all at size S.
NUM_TEXT, NEW_TOKENS, WARMUP_TOKENS = 50, 48, 4


def choose_size(quick: bool) -> tuple[Size, str, torch.dtype]:
    """Return widths, device and dtype for this machine."""
    on_gpu = torch.cuda.is_available()
    size = SIZES["toy"] if quick else SEVEN_B if on_gpu else SIZES["S"]
    return (size, "cuda", torch.bfloat16) if on_gpu else (size, "cpu", torch.float32)


def get_batch_sizes(device: str) -> tuple[int, ...]:
    """Return the numbers of sequences that are generated at once."""
    return (1, 8) if device == "cpu" else (1,)


def get_runners(device: str) -> list[str]:
    """Return the runners; with torch's own matmul only where oneDNN's is faster."""
    from llava_lite.model.fast.matmul import has_wide_vectors

    return [TRANSFORMERS, OURS, *([BY_TORCH] if device == "cpu" and has_wide_vectors() else [])]


def prompt(size: Size, batch_size: int, device: str, dtype) -> dict:
    """Return inputs of both models: 20 text tokens, a placeholder for every feature of an image, 30 more; seeded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.vocab_size - 1, (batch_size, NUM_TEXT + size.num_features), generator=generator)
    ids[:, 0] = BOS
    ids[:, 20 : 20 + size.num_features] = size.vocab_size - 1
    pixels = torch.randn(batch_size, 3, size.image_size, size.image_size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def build(name: str, size: Size, device: str, dtype):
    """Return the model of a runner; all hold the same weights."""
    # On the device: on a CPU, drawing the weights of 7B widths takes 45 s.
    with torch.device(device):
        if name == TRANSFORMERS:
            model = hf_model(size, 2, dtype=dtype)
            model.config.use_cache = model.config.text_config.use_cache = True
        else:
            plain_paths = ("matmul",) if name == BY_TORCH else ()
            model = our_model(size, 2, "auto", dtype, plain_paths, packed=False)
            model.config.image_token_index = size.vocab_size - 1
    # No end token: every runner makes as many tokens.
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def generate(model, inputs: dict, num_tokens: int) -> tuple[torch.Tensor, float, float]:
    """Return the new tokens [B, num_tokens] and the wall and CPU seconds that they took."""
    wall, cpu = time.perf_counter(), time.process_time()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)[:, -num_tokens:]
    if ids.is_cuda:
        torch.cuda.synchronize()
    return ids, time.perf_counter() - wall, time.process_time() - cpu


def run_child(name: str, quick: bool, num_tokens: int, threads: int) -> dict:
    """Return {"batch 1": {seconds of the first token, of all of them, the tokens}, ...} of one runner."""
    torch.set_num_threads(threads)
    size, device, dtype = choose_size(quick)
    model, report = build(name, size, device, dtype), {}
    for batch_size in get_batch_sizes(device):
        inputs = prompt(size, batch_size, device, dtype)
        generate(model, inputs, min(WARMUP_TOKENS, num_tokens))
        _, first_s, first_cpu_s = generate(model, inputs, 1)
        ids, wall_s, cpu_s = generate(model, inputs, num_tokens)
        report[f"batch {batch_size}"] = {
            "first_token_s": first_s,
            "first_token_cpu_s": first_cpu_s,
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "ids": ids.tolist(),
        }
    return report


def measure(runners: list[str], quick: bool, rounds: int, num_tokens: int, threads: int) -> dict:
    """Return {"batch 1": {runner: figures}, ...} from the processes of all rounds."""
    device = choose_size(quick)[1]

    def start(name, turn):
        spec = {"name": name, "quick": quick, "num_tokens": num_tokens, "threads": threads}
        return run_alone("benchmarks.generation", "--child", json.dumps(spec), threads=threads)

    reports = run_rounds(start, runners, TRANSFORMERS, rounds)
    results = {}
    for batch_size in get_batch_sizes(device):
        batch = f"batch {batch_size}"
        found = {name: [report[batch] for report in each] for name, each in reports.items()}
        results[batch] = compare(found, batch_size, num_tokens, exact=device == "cpu")
    return results


def compare(reports: dict[str, list[dict]], batch_size: int, num_tokens: int, exact: bool) -> dict:
    """Return {runner: figures}: tokens per second and its ratio to transformers', first token, a decode step.

    Raises RuntimeError if `exact` and a runner generates other tokens than transformers.
    """
    expected = torch.tensor(reports[TRANSFORMERS][0]["ids"])
    figures = {}
    for name, one in summary(get_samples(reports), TRANSFORMERS).items():
        same = (torch.tensor(reports[name][0]["ids"]) == expected).float().mean().item()
        if exact and same < 1:
            raise RuntimeError(f"{name} generates other tokens than {TRANSFORMERS}: {same:.0%} are equal.")
        first_s, first_cpu_s = (
            statistics.median(report[key] for report in reports[name])
            for key in ("first_token_s", "first_token_cpu_s")
        )
        figures[name] = {
            "tokens_per_s": batch_size * num_tokens / one["wall_s"],
            "first_token_s": first_s,
            "first_token_cpu_s": first_cpu_s,
            "step_s": (one["wall_s"] - first_s) / (num_tokens - 1),
            "step_cpu_s": (one["cpu_s"] - first_cpu_s) / (num_tokens - 1),
            "equal_tokens": same,
        } | {key: value for key, value in one.items() if key not in ("rate", "cpu_s_per_unit")}
    return figures


def show(results: dict) -> None:
    """Print a line for each runner."""
    for batch, figures in results.items():
        low, high = figures[TRANSFORMERS]["self_range"]
        print(f"{batch}, over {TRANSFORMERS} ({low:.2f} to {high:.2f} over itself):")
        for name, one in figures.items():
            print(
                f"  {name:28} {one['tokens_per_s']:7.1f} tokens/s {one['ratio']:5.2f}x  CPU {one['ratio_cpu']:5.2f}x"
                f"  first {one['first_token_s']:6.3f} s  step {one['step_s'] * 1e3:6.2f} ms"
                f"  equal {one['equal_tokens']:.0%}"
            )


def main(argv=None) -> dict:
    """Measure, print, and return what is written to --json."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        report = run_child(**json.loads(argv[1]))
        print(json.dumps(report), flush=True)
        return report
    args = arguments(__doc__.splitlines()[0], argv, lambda parser: parser.set_defaults(threads=1), rounds=3)
    runners = get_runners(choose_size(args.quick)[1])
    num_tokens = 6 if args.quick else NEW_TOKENS
    results = measure(runners, args.quick, args.rounds, num_tokens, args.threads)
    show(results)
    settings = {"new_tokens": num_tokens, "text_tokens": NUM_TEXT, "rounds": args.rounds, "quick": args.quick}
    return write_result("generation", results, args.json, args.threads, **settings)


if __name__ == "__main__":
    main()
