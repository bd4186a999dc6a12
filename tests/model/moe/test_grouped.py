"""Our experts function: a plain loop in float64 is the truth, transformers' eager function the rival."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from llava_lite.model.moe import activation as expert_activation
from llava_lite.model.moe import experts
from llava_lite.model.moe import groups as expert_groups
from llava_lite.model.moe.experts import OWN, Experts, MlpShape
from llava_lite.model.plain_paths import set_plain_paths

WIDTH, INNER = 16, 24
SHAPES = {
    "gated": MlpShape(True, False, WIDTH, INNER),
    "gated_biased": MlpShape(True, True, WIDTH, INNER),
    "biased": MlpShape(False, True, WIDTH, INNER),
}
ACTIVATIONS = {"silu": F.silu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


def get_expert_blocks(shape="gated", num_experts=5, hidden_act="silu", dtype=torch.float32, implementation=OWN):
    """Return seeded experts."""
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2, hidden_act=hidden_act)
    config._experts_implementation = implementation
    module = Experts(config, num_experts, SHAPES[shape])
    torch.manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(std=0.3)
    return module.to(dtype)


def routes_of(num_tokens, top_k, num_experts=5, avoid=()):
    """Return seeded tokens, chosen experts and weights; the experts of `avoid` are never chosen."""
    torch.manual_seed(1)
    allowed = torch.tensor([expert for expert in range(num_experts) if expert not in avoid])
    order = torch.rand(num_tokens, len(allowed)).argsort(dim=1)[:, :top_k]
    return torch.randn(num_tokens, WIDTH), allowed[order], torch.rand(num_tokens, top_k)


def plain_loop(module, hidden_act, tokens, chosen, weights):
    """Return the sum over assignments of weight times expert(token), token by token."""
    up, down = getattr(module, module.up_name), module.down_proj
    rows = []
    for token, of_token, token_weights in zip(tokens, chosen.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(of_token, token_weights, strict=True):
            inner = up[expert] @ token
            if module.has_bias:
                inner = inner + getattr(module, f"{module.up_name}_bias")[expert]
            act = ACTIVATIONS[hidden_act]
            inner = act(inner[:INNER]) * inner[INNER:] if module.has_gate else act(inner)
            out = down[expert] @ inner
            row = row + weight * (out + module.down_proj_bias[expert] if module.has_bias else out)
        rows.append(row)
    # The graph of nothing: zero for every parameter.
    return torch.stack(rows) if rows else tokens + 0 * sum(param.sum() for param in (*module.parameters(), weights))


def results_of(run, module, tokens, chosen, weights, ahead):
    """Return the output and all gradients of run(module, tokens, chosen, weights), in double precision."""
    module.zero_grad()
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(module, tokens, chosen, weights)
    (out * ahead.to(out.dtype)).sum().backward()
    grads = {name: param.grad for name, param in module.named_parameters()}
    named = {"output": out, "tokens": tokens.grad, "weights": weights.grad, **grads}
    return {name: tensor.detach().double() for name, tensor in named.items()}


def assert_close(found, expected, output=1e-6, gradient=1e-5):
    """Compare, in fractions of the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1).item() if tensor.numel() else 1
        tolerance = scale * (output if name == "output" else gradient)
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


CASES = [
    *((shape, "silu", 37, top_k, ()) for shape in SHAPES for top_k in (1, 2, 3, 4)),
    *(("gated", act, 20, 2, ()) for act in ("gelu", "gelu_new", "relu")),
    *(("biased", act, 20, 2, ()) for act in ("gelu", "gelu_new", "relu")),
    *((shape, "silu", num_tokens, 2, ()) for shape in SHAPES for num_tokens in (0, 1)),
    *((shape, "silu", 30, 2, (0, 3)) for shape in SHAPES),
    ("gated", "silu", 300, 2, ()),
]


@pytest.mark.parametrize(("shape", "hidden_act", "num_tokens", "top_k", "avoid"), CASES)
def test_outputs_and_gradients_are_those_of_a_loop_and_of_transformers(shape, hidden_act, num_tokens, top_k, avoid):
    module = get_expert_blocks(shape, hidden_act=hidden_act)
    routes = routes_of(num_tokens, top_k, avoid=avoid)
    ahead = torch.randn(num_tokens, WIDTH)
    found = results_of(lambda module, *given: module(*given), module, *routes, ahead)
    for expert in avoid:
        assert not any(found[name][expert].any() for name, _ in module.named_parameters())
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in routes]
    loop = results_of(
        lambda module, *given: plain_loop(module, hidden_act, *given), copy.deepcopy(module).double(), *exact, ahead
    )
    assert_close(found, loop)
    eager = get_expert_blocks(shape, hidden_act=hidden_act, implementation="eager")
    assert_close(found, results_of(lambda module, *given: module(*given), eager, *routes, ahead))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_double_precision_nothing_but_the_order_of_sums_differs(shape):
    module = get_expert_blocks(shape, dtype=torch.float64)
    tokens, chosen, weights = routes_of(20, 2)
    given = tokens.double(), chosen, weights.double()
    found = results_of(lambda module, *given: module(*given), module, *given, torch.ones(20, WIDTH))
    loop = results_of(lambda module, *given: plain_loop(module, "silu", *given), module, *given, torch.ones(20, WIDTH))
    assert_close(found, loop, 1e-13, 1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_a_float32_router_get_gradients_from_experts_of_double_precision(shape):
    module = get_expert_blocks(shape, dtype=torch.float64)
    tokens, chosen, weights = routes_of(20, 2)
    weights.requires_grad_()
    module(tokens.double(), chosen, weights).sum().backward()
    found, weights.grad = weights.grad, None
    plain_loop(module, "silu", tokens.double(), chosen, weights.double()).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weights.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_near_to_the_truth_as_transformers_is(shape):
    tokens, chosen, weights = routes_of(64, 2)
    tokens, ahead = tokens.bfloat16(), torch.randn(64, WIDTH).bfloat16()
    far = {}
    for implementation in (OWN, "eager"):
        module = get_expert_blocks(shape, dtype=torch.bfloat16, implementation=implementation)
        found = results_of(lambda module, *given: module(*given), module, tokens, chosen, weights, ahead)
        given = tokens.double(), chosen, weights.double()
        loop = lambda module, *given: plain_loop(module, "silu", *given)  # noqa: E731
        exact = results_of(loop, module.double(), *given, ahead.double())
        far[implementation] = {name: (found[name] - exact[name]).norm() / exact[name].norm() for name in exact}
    for name, distance in far[OWN].items():
        # 8 bits of mantissa: a part in 256 for each step of the way.
        assert distance < max(1.25 * far["eager"][name], 2**-8), name


@pytest.mark.parametrize("views", ["tokens", "weights", "gradient"])
def test_what_does_not_lie_in_one_piece_changes_nothing(views):
    module = get_expert_blocks()
    tokens, chosen, weights = routes_of(20, 2)
    ahead = torch.randn(20, WIDTH)
    expected = results_of(lambda module, *given: module(*given), module, tokens, chosen, weights, ahead)

    def spread(tensor):
        return tensor.t().contiguous().t()

    def run(module, tokens, chosen, weights):
        if views == "tokens":
            tokens = spread(tokens)
        if views == "weights":
            chosen, weights = spread(chosen), spread(weights)
        out = module(tokens, chosen, weights)
        return spread(out) if views == "gradient" else out

    assert_close(results_of(run, module, tokens, chosen, weights, ahead), expected)


@pytest.mark.parametrize("trained", ["nothing", "up", "down", "tokens", "weights"])
def test_only_trainable_weights_get_a_gradient(trained):
    module = get_expert_blocks("gated_biased")
    tokens, chosen, weights = routes_of(20, 2)
    ahead = torch.randn(20, WIDTH)
    expected = results_of(lambda module, *given: module(*given), module, tokens, chosen, weights, ahead)
    trainable = {"nothing": (), "up": ("gate_up_proj", "gate_up_proj_bias"), "down": ("down_proj", "down_proj_bias")}
    for name, param in module.named_parameters():
        param.requires_grad_(name in trainable.get(trained, ())).grad = None
    tokens.requires_grad_(trained == "tokens")
    weights.requires_grad_(trained == "weights")
    out = module(tokens, chosen, weights)
    assert out.requires_grad == (trained != "nothing")
    if trained != "nothing":
        (out * ahead).sum().backward()
    found = {"tokens": tokens.grad, "weights": weights.grad} | {n: p.grad for n, p in module.named_parameters()}
    found = {name: grad.double() for name, grad in found.items() if grad is not None}
    assert set(found) == set(trainable.get(trained, (trained,)))
    assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_changes_no_gradient(shape):
    module = get_expert_blocks(shape)
    routes, ahead = routes_of(20, 2), torch.randn(20, WIDTH)
    plain = results_of(lambda module, *given: module(*given), module, *routes, ahead)
    again = results_of(lambda module, *given: checkpoint(module, *given, use_reentrant=False), module, *routes, ahead)
    assert_close(again, plain, 0, 0)


def test_a_graph_that_is_kept_can_be_walked_twice():
    module = get_expert_blocks()
    tokens, chosen, weights = routes_of(20, 2)
    loss = module(tokens, chosen, weights).square().sum()
    first = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_few_assignments_give_what_one_block_gives(monkeypatch, shape):
    module = get_expert_blocks(shape)
    routes, ahead = routes_of(60, 2), torch.randn(60, WIDTH)
    full = results_of(lambda module, *given: module(*given), module, *routes, ahead)
    # 3 assignments a block, and 1.
    for block in (3 * INNER, 1):
        monkeypatch.setattr(expert_activation, "BLOCK", block)
        found = results_of(lambda module, *given: module(*given), module, *routes, ahead)
        assert_close(found, full, 1e-6, 1e-6)


def test_only_tokens_and_inner_activations_are_kept_for_the_backward_pass():
    module = get_expert_blocks()
    tokens, chosen, weights = routes_of(20, 2)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(tokens.requires_grad_(), chosen, weights)
    params = [param.data_ptr() for param in module.parameters()]
    assert [tensor.data_ptr() for tensor in kept if tensor.dim() == 3] == params, "the parameters, no copies"
    others = sum(tensor.numel() for tensor in kept if tensor.dim() < 3)
    assert others == tokens.numel() + weights.numel() + chosen.numel() * 2 * INNER


def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_that_of_the_weights():
    module = get_expert_blocks()
    tokens, chosen, weights = routes_of(20, 2)
    exact = module(tokens, chosen, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(tokens, chosen, weights)
    assert out.dtype == torch.float32
    assert 0 < (out - exact).abs().max() < 0.1
    out.sum().backward()
    assert all(param.grad.dtype == torch.float32 for param in module.parameters())


def watch(monkeypatch):
    """Return a list that gets the name of every function of transformers' interface, and of ours, that runs."""
    ran = []
    # An interface of its own: undoing an entry of the shared one would leave the function there for good.
    interface = type(experts.ALL_EXPERTS_FUNCTIONS)()
    monkeypatch.setattr(experts, "ALL_EXPERTS_FUNCTIONS", interface)
    for name in (OWN, "grouped_mm", "batched_mm"):
        real = interface[name]
        spy = lambda *given, real=real, name=name: ran.append(name) or real(*given)  # noqa: E731
        interface[name] = spy
    return ran


@pytest.mark.parametrize("asked", [None, OWN, "grouped_mm", "batched_mm", "eager"])
def test_the_function_that_a_user_names_runs_and_ours_without_a_name(monkeypatch, asked):
    ran = watch(monkeypatch)
    get_expert_blocks(implementation=asked)(*routes_of(8, 2))
    assert ran == ([] if asked == "eager" else [asked or OWN])


def test_transformers_runs_the_experts_on_the_plain_path_and_where_weights_are_not_plain(monkeypatch):
    ran = watch(monkeypatch)
    module = get_expert_blocks()
    set_plain_paths(module, ["experts"])
    module(*routes_of(8, 2))
    set_plain_paths(module, [])
    module(*routes_of(8, 2))
    module.down_proj.data = module.down_proj.data.bfloat16()
    module(*routes_of(8, 2))
    assert ran == ["grouped_mm", OWN, "grouped_mm"]


def grouped_matmul(left, right, offs):
    """Return what torch's grouped_mm returns, from its definition: 2-D by 3-D, or 2-D by 2-D."""
    assert offs.dtype == torch.int32
    spans = [slice(start, end) for start, end in itertools.pairwise([0, *offs.tolist()])]
    if right.dim() == 3:
        return torch.cat([left[span] @ right[expert] for expert, span in enumerate(spans)])
    # As some kernels do where a group is empty: rubbish.
    parts = [left[:, s] @ right[s] if s.stop > s.start else left.new_full((len(left), 1), float("nan")) for s in spans]
    return torch.stack([part.expand(len(left), right.shape[1]) for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_tokens", "top_k", "avoid"), [(30, 2, ()), (30, 1, (0, 3)), (1, 3, ()), (0, 2, ())])
def test_one_group_of_all_experts_gives_what_one_group_each_gives(monkeypatch, shape, dtype, num_tokens, top_k, avoid):
    """The path of CUDA, with a matmul by the definition in place of the kernel."""
    module = get_expert_blocks(shape, dtype=dtype)
    tokens, chosen, weights = routes_of(num_tokens, top_k, avoid=avoid)
    given = (tokens.to(dtype), chosen, weights, torch.randn(num_tokens, WIDTH))
    one_by_one = results_of(lambda module, *given: module(*given), module, *given)
    monkeypatch.setattr(F, "grouped_mm", grouped_matmul)
    monkeypatch.setattr("llava_lite.model.moe.grouped.can_group", lambda *given: True)
    at_once = results_of(lambda module, *given: module(*given), module, *given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert_close(at_once, one_by_one, tolerance, tolerance)


def test_experts_of_odd_width_and_old_devices_run_one_by_one(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not expert_groups.can_group(cuda, torch.bfloat16, (16, 24))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert expert_groups.can_group(cuda, torch.bfloat16, (16, 24))
    assert not expert_groups.can_group(cuda, torch.bfloat16, (16, 25))
    assert not expert_groups.can_group(cpu, torch.bfloat16, (16, 24))


def test_a_compiled_call_takes_transformers_function_and_gives_the_same():
    module = get_expert_blocks()
    routes = routes_of(12, 2)
    with torch.no_grad():
        expected = module(*routes)
        compiled = torch.compile(module, fullgraph=True, backend="eager")(*routes)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_on_two_ranks_zero_2_and_3_take_the_step_of_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.2, **shape)).save_pretrained(tmp_path / "dense")
    out = tmp_path / "results.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launcher, str(Path(__file__).with_name("grouped_experts_worker.py")), str(tmp_path / "dense"), str(out)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(out.read_text())
    assert len(results) == 6
    for case, result in results.items():
        # Sums of two ranks and of two batches, and ours and eager's, differ in order.
        assert result["stepped"] < 1e-6, case
        assert result["calls"] == (4 if "checkpointing" in case else 2), case
