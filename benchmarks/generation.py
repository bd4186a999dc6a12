"""Turn one prompt with a picture into new tokens, greedily: stock transformers and llava-lite on the same weights.

Dynamic and static cache. On a CPU size S; on a GPU 7B widths in bfloat16 with random weights, against
stock as it comes. A call with one new token is the time to the first token; the rest over the rest is a step.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import torch

from benchmarks.rivals import our_model, stock_model
from benchmarks.table import BY_TORCH as PLAIN
from benchmarks.timing import arguments, interleave, summary, write_result
from benchmarks.workload import BOS, SIZES, Size

OURS, STOCK, STATIC = "llava-lite", "transformers, dynamic cache", "transformers, static cache"
OURS_STATIC = "llava-lite, static cache"
SEVEN_B = Size(4096, 11008, 32, 32, image_size=336, vision_width=1024, vision_layers=24)
# Tokens of the prompt beside the picture's, as at size S: 306 in all.
NUM_WORDS, NEW_TOKENS = 50, 48


def prompt(size: Size, num_rows: int, device: str, dtype) -> dict:
    """Return inputs of both models: 20 words, a placeholder for every feature of a picture, 30 words; seeded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.vocab_size - 1, (num_rows, NUM_WORDS + size.num_features), generator=generator)
    ids[:, 0] = BOS
    ids[:, 20 : 20 + size.num_features] = size.vocab_size - 1
    pixels = torch.randn(num_rows, 3, size.image_size, size.image_size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def build(size: Size, device: str, dtype) -> dict:
    """Return {runner: (model, keywords of generate)}; ours and stock's hold the same weights.

    A keyword of our own: onednn, False for torch's own products.
    """
    # On the device: drawing the weights of 7B widths on a CPU takes 45 s a model.
    with torch.device(device):
        ours = our_model(size, 2, "auto", dtype, packed=False).to(device).eval()
        stock = stock_model(size, 2, dtype=dtype).to(device).eval()
    ours.config.image_token_index = size.vocab_size - 1
    stock.config.use_cache = stock.config.text_config.use_cache = True
    for model in (ours, stock):
        # No end: every runner makes as many tokens.
        model.generation_config.eos_token_id = None
    runners = {STOCK: (stock, {}), OURS: (ours, {})}
    # On a GPU transformers compiles the step of a static cache.
    static = {"cache_implementation": "static"} | ({"disable_compile": True} if device == "cpu" else {})
    runners |= {STATIC: (stock, static), OURS_STATIC: (ours, static)}
    if device == "cpu":
        runners[PLAIN] = (ours, {"onednn": False})
    return runners


def ask(model, inputs: dict, num_tokens: int, more: dict) -> torch.Tensor:
    """Return the new tokens [B, num_tokens]."""
    keywords = {key: value for key, value in more.items() if key != "onednn"}
    with contextlib.nullcontext() if more.get("onednn", True) else torch.backends.mkldnn.flags(enabled=False):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, **keywords)[:, -num_tokens:]
    if ids.is_cuda:
        torch.cuda.synchronize()
    return ids


def measure(runners: dict, inputs: dict, rounds: int, num_tokens: int = NEW_TOKENS) -> dict:
    """Return {runner: figures}: tokens a second and its ratio to stock's dynamic cache, first token, a step.

    Raises RuntimeError if a runner says other tokens than stock.
    """
    num_rows = len(inputs["input_ids"])
    expected = ask(*_of(runners[STOCK], inputs, num_tokens))
    same = {}
    for name, runner in runners.items():
        same[name] = (ask(*_of(runner, inputs, num_tokens)) == expected).float().mean().item()
        if inputs["pixel_values"].dtype == torch.float32 and same[name] < 1:
            raise RuntimeError(f"{name} says other tokens than {STOCK}: {same[name]:.0%} are equal.")
    firsts = {name: [] for name in runners}

    def call(name):
        model, more = runners[name]
        wall, cpu = time.perf_counter(), time.process_time()
        ask(model, inputs, 1, more)
        firsts[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = time.perf_counter(), time.process_time()
        ask(model, inputs, num_tokens, more)
        return time.perf_counter() - wall, time.process_time() - cpu

    found = summary(interleave({name: lambda name=name: call(name) for name in runners}, rounds, again=STOCK), STOCK)
    figures = {}
    for name, one in found.items():
        # The first is that of the warm-up.
        first_s, first_cpu_s = (statistics.median(pair[i] for pair in firsts[name][1:]) for i in (0, 1))
        figures[name] = {
            "tokens_per_s": num_rows * num_tokens / one["wall_s"],
            "first_token_s": first_s,
            "first_token_cpu_s": first_cpu_s,
            "step_s": (one["wall_s"] - first_s) / (num_tokens - 1),
            "step_cpu_s": (one["cpu_s"] - first_cpu_s) / (num_tokens - 1),
            "equal_tokens": same[name],
        } | {key: value for key, value in one.items() if key not in ("rate", "cpu_s_per_unit")}
    return figures


def _of(runner, inputs, num_tokens):
    model, more = runner
    return model, inputs, num_tokens, more


def run(size: Size, device: str, dtype, rounds: int, num_tokens: int = NEW_TOKENS):
    """Yield {"batch 1": {runner: figures}, ...} after each batch."""
    runners, results = build(size, device, dtype), {}
    for num_rows in (1, 8) if device == "cpu" else (1,):
        results[f"batch {num_rows}"] = measure(runners, prompt(size, num_rows, device, dtype), rounds, num_tokens)
        yield results


def show(results: dict) -> None:
    """Print a line a runner."""
    for batch, figures in results.items():
        print(f"{batch}, against {STOCK} ({figures[STOCK]['self_range'][0]:.2f} to ", end="")
        print(f"{figures[STOCK]['self_range'][1]:.2f} against itself):")
        for name, one in figures.items():
            print(
                f"  {name:28} {one['tokens_per_s']:7.1f} tokens/s {one['ratio']:5.2f}x  CPU {one['ratio_cpu']:5.2f}x"
                f"  first {one['first_token_s']:6.3f} s  step {one['step_s'] * 1e3:6.2f} ms"
                f"  equal {one['equal_tokens']:.0%}"
            )


def main(argv=None):
    """Print and write the figures."""
    args = arguments(__doc__.splitlines()[0], argv, lambda parser: parser.set_defaults(threads=1))
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    size = SIZES["toy"] if args.quick else SEVEN_B if on_gpu else SIZES["S"]
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    num_tokens = 6 if args.quick else NEW_TOKENS
    settings = {"new_tokens": num_tokens, "words": NUM_WORDS, "rounds": args.rounds, "quick": args.quick}
    for results in run(size, device, dtype, args.rounds, num_tokens):
        report = write_result("generation", results, args.json, args.threads, **settings)
    show(results)
    return report


if __name__ == "__main__":
    main()
