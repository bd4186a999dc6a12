"""Measure time and memory of one MoE layer, forward and backward: ours, DeepSpeed's and transformers'.

All get the same weights and the same tokens, in one process and by turns. DeepSpeed's layer is called as MoE-LLaVA
calls it (capacity 1.5, the second expert sampled) and once more without dropping; transformers' is Mixtral's block,
which computes what ours does except for the balance loss. Where oneDNN's matmul is faster than torch's, ours also runs
with torch's. On CUDA the widths are those of a 7B model, in bfloat16.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass

import torch

from benchmarks.table import BY_TORCH
from benchmarks.timing import arguments, interleave, summary, write_result

NUM_EXPERTS, TOP_K = 4, 2
OURS, DEEPSPEED = "llava-lite", "deepspeed, capacity 1.5"


@dataclass(frozen=True)
class Size:
    """Widths of the layer, dtype, and the numbers of tokens of a batch."""

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    training_tokens: tuple[int, ...]
    few_tokens: tuple[int, ...] = (1, 16, 256)

    def flops(self, num_tokens):
        """Return the least flops of the experts' matrices, forward and backward."""
        return 3 * 2 * num_tokens * TOP_K * 3 * self.hidden_size * self.intermediate_size


SIZES = {
    "cpu": Size(512, 1376, torch.float32, (1800, 6144)),
    "cuda": Size(4096, 11008, torch.bfloat16, (6240, 12480)),
    "quick": Size(32, 64, torch.float32, (48,), (1,)),
}


def start_deepspeed(device):
    """Set up a group of one rank; return whether DeepSpeed is installed."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import groups
    except ImportError:
        return False
    if not torch.distributed.is_initialized():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False)
        groups._create_expert_and_data_parallel(1)
    return True


def build_layers(size, device):
    """Return {name: module that returns (output, balance loss or None)}, all with the same weights."""
    from transformers import LlamaConfig, MixtralConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from llava_lite.model.moe.block import MoeBlock, init_moe_weights, read_moe_config
    from llava_lite.model.plain_paths import install_fast_paths

    widths = {"hidden_size": size.hidden_size, "intermediate_size": size.intermediate_size}
    torch.manual_seed(0)
    config = LlamaConfig(**widths)
    ours = MoeBlock(config, read_moe_config({"moe_mode": "dense"}, 1), NUM_EXPERTS, LlamaMLP(config))
    ours.apply(lambda module: init_moe_weights(module, 0.02))
    install_fast_paths(ours)
    layers = {OURS: OurLayer(ours)}
    for implementation in ("grouped_mm", "eager"):
        config = MixtralConfig(**widths, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
        config._experts_implementation = implementation
        theirs = MixtralSparseMoeBlock(config)
        theirs.load_state_dict(ours.state_dict())
        layers[f"transformers, {implementation}"] = TransformersLayer(theirs)
    if start_deepspeed(device):
        expert = LlamaMLP(LlamaConfig(**widths))
        # As MoE-LLaVA calls it; without dropping also without noise, so that its output can be compared.
        layers[DEEPSPEED] = deepspeed_layer(ours, expert, size.hidden_size, capacity_factor=1.5, min_capacity=0)
        layers["deepspeed, no dropping"] = deepspeed_layer(
            ours, expert, size.hidden_size, drop_tokens=False, top2_2nd_expert_sampling=False
        )
    return {name: layer.to(device, size.dtype).train() for name, layer in layers.items()}


class OurLayer(torch.nn.Module):
    """Our block with the context that a model's forward pass gives it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden):
        """Return output and balance loss."""
        from llava_lite.model.moe.block import RoutingContext, use_routing

        context = RoutingContext(training=True)
        with use_routing(context):
            output = self.block(hidden)
        return output, context.balance_losses()[0]


class TransformersLayer(torch.nn.Module):
    """transformers' block, whose balance loss is computed elsewhere."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden):
        """Return output and no balance loss."""
        return self.block(hidden), None


class DeepspeedLayer(torch.nn.Module):
    """DeepSpeed's layer without its counts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        """Return output and balance loss."""
        return self.layer(hidden)[:2]


def deepspeed_layer(ours, expert, hidden_size, **options):
    """Return DeepSpeed's layer with our weights."""
    from deepspeed.moe.layer import MoE

    from llava_lite.formats.moe_llava import to_moe_llava

    layer = MoE(hidden_size, copy.deepcopy(expert), num_experts=NUM_EXPERTS, ep_size=1, k=TOP_K, **options)
    layer.set_deepspeed_parallelism()
    prefix = "model.layers.0.mlp."
    weights = to_moe_llava({prefix + name: weight for name, weight in ours.state_dict().items()})
    layer.load_state_dict({name.removeprefix(prefix): weight for name, weight in weights.items()})
    return DeepspeedLayer(layer)


def training_step(layer, hidden, gradient):
    """Return a runner of forward and backward, which times itself on CUDA."""

    def run():
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        output, balance = layer(hidden)
        loss = (output * gradient).sum()
        (loss if balance is None else loss + 0.01 * balance).backward()

    return on_device(run, hidden.device)


def forward_pass(layer, hidden):
    """Return a runner of the forward pass alone, as in generation."""

    def run():
        with torch.no_grad():
            layer(hidden)

    return on_device(run, hidden.device)


def by_torch(run, layer):
    """Return our runner with torch's own matmul."""
    from llava_lite.model.plain_paths import set_plain_paths

    def plain():
        set_plain_paths(layer, {"matmul"})
        try:
            return run()
        finally:
            set_plain_paths(layer, ())

    return plain


def on_device(run, device):
    """Return the runner; on CUDA it waits for the device and returns its seconds."""
    if device.type != "cuda":
        return run

    def timed():
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return timed


def peak_bytes(run, device):
    """Return the peak memory of one call above what was allocated before it."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held, peak = 0, 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def largest_difference(layers, hidden):
    """Return for each other layer the largest difference of its output from ours, over our largest output."""
    with torch.no_grad():
        own = layers[OURS](hidden)[0].float()
        others = {name: layer(hidden)[0].float() for name, layer in layers.items() if name != OURS}
    return {name: ((other - own).abs().max() / own.abs().max()).item() for name, other in others.items()}


def measure(layers, size, num_tokens, device, rounds):
    """Return {layer: figures} of forward and backward, and of memory, at a number of tokens."""
    from llava_lite.model.fast.matmul import has_wide_vectors

    hidden = torch.randn(1, num_tokens, size.hidden_size, device=device, dtype=size.dtype, requires_grad=True)
    gradient = torch.randn_like(hidden)
    runners = {name: training_step(layer, hidden, gradient) for name, layer in layers.items()}
    if hidden.device.type == "cpu" and has_wide_vectors():
        runners[BY_TORCH] = by_torch(runners[OURS], layers[OURS])
    base = DEEPSPEED if DEEPSPEED in layers else "transformers, grouped_mm"
    figures = summary(interleave(runners, rounds, again=OURS), base, num_tokens)
    differences = largest_difference(layers, hidden)
    for name, figure in figures.items():
        figure["useful_flops_per_s"] = size.flops(num_tokens) / figure["wall_s"]
        figure["peak_bytes"] = peak_bytes(runners[name], hidden.device)
        figure["difference"] = differences.get(name, 0.0)
        figure["base"] = base
    return figures


def measure_few(layers, size, num_tokens, device, rounds):
    """Return {layer: figures} of the forward pass alone; calls are short, so a sample is many of them."""
    from llava_lite.model.fast.matmul import has_wide_vectors

    hidden = torch.randn(1, num_tokens, size.hidden_size, device=device, dtype=size.dtype)
    repeats = max(1, 512 // num_tokens)
    runners = {}
    for name, layer in layers.items():
        if name.startswith("deepspeed"):
            continue
        once = forward_pass(layer, hidden)
        runners[name] = lambda once=once: [once() for _ in range(repeats)] and None
    if hidden.device.type == "cpu" and has_wide_vectors():
        runners[BY_TORCH] = by_torch(runners[OURS], layers[OURS])
    figures = summary(interleave(runners, rounds, again=OURS), "transformers, grouped_mm", num_tokens * repeats)
    return figures


def main(argv=None):
    """Print and write the figures."""
    args = arguments(__doc__.splitlines()[0], argv, rounds=3)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES["quick" if args.quick else device]
    with torch.device(device):
        layers = build_layers(size, device)
    results = {"training": {}, "forward of few tokens": {}}
    for num_tokens in size.training_tokens:
        figures = measure(layers, size, num_tokens, device, args.rounds)
        results["training"][num_tokens] = figures
        print(f"{num_tokens} tokens, forward and backward, over {figures[OURS]['base']}:")
        for name, figure in figures.items():
            print(
                f"  {name:26} {figure['wall_s'] * 1e3:8.1f} ms  {figure['ratio']:5.2f}x"
                f"  CPU {figure['cpu_s'] * 1e3:8.1f} ms  {figure['ratio_cpu']:5.2f}x"
                f"  {figure['useful_flops_per_s'] / 1e9:8.0f} GFLOP/s  {figure['peak_bytes'] / 2**20:8.1f} MiB"
                f"  difference {figure['difference']:.1e}"
            )
        print(f"  {OURS} over itself: {figures[OURS]['self_range']}")
    for num_tokens in size.few_tokens:
        figures = measure_few(layers, size, num_tokens, device, args.rounds)
        results["forward of few tokens"][num_tokens] = figures
        ratios = ", ".join(f"{name} {figure['ratio']:.2f}x" for name, figure in figures.items())
        print(f"{num_tokens} tokens, forward, over transformers' grouped_mm: {ratios}")
    settings = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "rounds": args.rounds, "quick": args.quick}
    return write_result("moe_layer", results, args.json, args.threads, **settings)


if __name__ == "__main__":
    main()
