"""Expert parallelism: what is refused, and that ranks with some of the experts train as ranks with all of them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rank_launcher import run_ranks
from safetensors.torch import load_file

from llava_lite.model.moe.block import RoutingContext
from llava_lite.model.moe.parallel import join_weights, split_weights
from llava_lite.train.arguments.fields import ModelArguments
from llava_lite.train.arguments.validate import check_expert_parallel
from llava_lite.train.deepspeed.experts import (
    check_experts_divide,
    needs_all_ranks,
    parallel_experts,
    split_blocks,
    with_all_experts,
)
from llava_lite.train.monitor.experts import flat_report
from llava_lite.train.monitor.throughput import step_flops
from llava_lite.train.tuning import count, parameter_groups

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).parents[1] / "resume_cases.py"
MOE = {"moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2}


# What is refused.


def run_of(**more):
    """Return what is read of TrainingArguments."""
    return SimpleNamespace(**({"uses_deepspeed": True, "zero_stage": 2, "tuning": "moe", "world_size": 4} | more))


@pytest.mark.parametrize(
    ("model_flags", "run", "output"),
    [
        ({}, {"uses_deepspeed": False, "zero_stage": 0}, "--ep_size 2 needs ZeRO: .*zero2 or zero3.*no --deepspeed"),
        ({}, {"zero_stage": 1}, "--ep_size 2 needs ZeRO: .* got stage 1"),
        ({}, {"tuning": "lora"}, "--ep_size 2 divides trained experts among ranks; --tuning lora trains none"),
        ({"moe_drop_tokens": True}, {}, "--moe_drop_tokens True and --ep_size 2 contradict"),
        ({"use_residual": True}, {}, "--use_residual True and --ep_size 2 contradict"),
        ({"num_experts": [4, 3]}, {}, "--ep_size 2 and --num_experts 3"),
        ({}, {"world_size": 3}, "--ep_size 2 with 3 ranks"),
    ],
)
def test_flags_that_do_not_go_with_expert_parallelism_are_refused(model_flags, run, output):
    with pytest.raises(ValueError, match=output):
        check_expert_parallel(ModelArguments(ep_size=2, **model_flags), run_of(**run))


def test_ranks_in_complete_groups_under_zero_may_split_experts():
    for stage in (2, 3):
        check_expert_parallel(ModelArguments(ep_size=2, num_experts=[4]), run_of(zero_stage=stage))


@pytest.mark.parametrize(
    ("kind", "moe", "output"),
    [
        ("llama", None, "--ep_size 2: this model has no experts"),
        ("llama", {"num_experts": [3]}, "layer 0 has 3 experts, which 2 ranks cannot divide evenly"),
        ("phi", {}, "layer 0 has experts of fc1 with biases; only gated ones without biases"),
        ("llama", {"use_residual": True}, "layer 0 keeps a dense MLP"),
        ("llama", {"moe_drop_tokens": True}, "layer 0 drops tokens"),
    ],
)
def test_experts_that_cannot_be_split_over_ranks_are_refused(toy_model, kind, moe, output):
    model = toy_model(kind, None if moe is None else MOE | moe, tower=None)
    with pytest.raises(ValueError, match=output):
        check_experts_divide(model, 2, {})


def test_frozen_experts_a_second_kind_of_expert_parallelism_and_nvme_are_refused(toy_model):
    model = toy_model(moe=MOE, tower=None)
    with pytest.raises(ValueError, match=r"--ep_size 2 and expert_parallel in the DeepSpeed JSON"):
        check_experts_divide(model, 2, {"expert_parallel": {"enabled": True, "autoep_size": 2}})
    with pytest.raises(ValueError, match="--ep_size 2 with the optimizer on NVMe under ZeRO-3"):
        check_experts_divide(model, 2, json.loads((ROOT / "scripts/zero3_offload_nvme.json").read_text()))
    check_experts_divide(model, 2, json.loads((ROOT / "scripts/zero3_offload.json").read_text()))
    model.moe_layers()[2].experts.down_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="layer 2: down_proj of the experts do not train"):
        check_experts_divide(model, 2, {})


def test_a_checkpoint_of_expert_parallel_training_records_one_rank():
    assert ModelArguments(moe_enable=True, ep_size=2).moe_config()["ep_size"] == 1


# One process.


def test_each_rank_takes_its_experts_and_together_they_are_all_of_them():
    gate_up, down = torch.randn(6, 8, 3), torch.randn(6, 3, 4)
    shards = [split_weights(gate_up, down, rank, 3) for rank in range(3)]
    for expert in range(6):
        held, place = shards[expert // 2], expert % 2
        assert torch.equal(held["w1"][place], gate_up[expert, :4])
        assert torch.equal(held["w3"][place], gate_up[expert, 4:])
        assert torch.equal(held["w2"][place], down[expert])
    assert all(weight.is_contiguous() for held in shards for weight in held.values())
    full = join_weights(shards)
    assert torch.equal(full["gate_up_proj"], gate_up)
    assert torch.equal(full["down_proj"], down)


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def pair(toy_model, group):
    """Two equal models with experts that differ; the second one's are split over ranks, of which there is one."""
    model = toy_model(moe=MOE, tower=None)
    with torch.no_grad():
        for block in model.moe_layers().values():
            for weight in block.experts.parameters():
                weight.normal_(std=0.2)
    shared = copy.deepcopy(model)
    split_blocks(shared, "ep_size_1", group, group)
    return model, shared


def test_experts_split_over_ranks_train_as_complete_ones_do(pair):
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    # Padding takes no expert, on either way.
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model, shared = pair
    routing = [RoutingContext() for _ in pair]
    results = [
        each.train()(input_ids=ids, attention_mask=mask, labels=ids, routing=one)
        for each, one in zip(pair, routing, strict=True)
    ]
    for result in results:
        result.loss.backward()
    assert results[1].loss.item() == pytest.approx(results[0].loss.item(), rel=1e-6)
    assert results[1].moe_loss.item() == pytest.approx(results[0].moe_loss.item(), rel=1e-6)
    for layer, block in shared.moe_layers().items():
        hf, experts = model.moe_layers()[layer], block.experts
        grad = torch.cat([experts.w1.grad, experts.w3.grad], dim=1)
        torch.testing.assert_close(grad, hf.experts.gate_up_proj.grad)
        torch.testing.assert_close(experts.w2.grad, hf.experts.down_proj.grad)
        torch.testing.assert_close(block.gate.weight.grad, hf.gate.weight.grad)
        assert torch.equal(routing[1].counts()[layer][0], routing[0].counts()[layer][0])
    weights = (each.get_input_embeddings().weight.grad for each in pair)
    torch.testing.assert_close(*weights)


def test_rank_without_a_token_still_gives_every_expert_a_gradient(pair):
    experts = pair[1].moe_layers()[0].experts
    tokens = torch.zeros(0, 32, requires_grad=True)
    out = experts(tokens, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(not weight.grad.any() for weight in experts.parameters())


def test_saved_state_holds_all_experts_under_their_own_names(pair):
    model, shared = pair
    state = with_all_experts(shared, dict(shared.state_dict()), keep=True)
    full = model.state_dict()
    assert set(state) == set(full)
    assert all(torch.equal(state[name], weight) for name, weight in full.items())
    assert with_all_experts(shared, {}, keep=False) == {}
    assert with_all_experts(model, full, keep=True) is full


def test_engine_sees_layers_of_autoep_and_groups_of_experts(pair):
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.utils import is_moe_param

    model, shared = pair
    assert all(isinstance(block, AutoEPMoELayer) for block in shared.moe_layers().values())
    args = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, mm_projector_lr=None, mm_vision_tower_lr=None)
    names = [name for name, _ in shared.named_parameters() if "norm" not in name]
    groups = {group.name: group.for_optimizer() for group in parameter_groups(shared, args, names)}
    assert groups["experts"]["moe"] is True
    assert groups["experts"]["name"] == "ep_size_1"
    for name, group in groups.items():
        assert all(is_moe_param(weight) == (name == "experts") for weight in group["params"])
        assert ("moe" in group) == (name == "experts")
    assert needs_all_ranks(shared)
    assert not needs_all_ranks(model)
    assert len(parallel_experts(shared)) == 2


def test_experts_of_other_ranks_count_as_work_and_as_parameters(pair):
    model, shared = pair
    for block in shared.moe_layers().values():
        # As if there were a second rank: half of each weight is there.
        for name in ("w1", "w2", "w3"):
            weight = torch.nn.Parameter(getattr(block.experts, name)[:2].detach())
            weight.num_shards = 2
            setattr(block.experts, name, weight)
    assert sum(map(count, shared.parameters())) == sum(map(count, model.parameters()))
    assert step_flops(shared) == step_flops(model)


# Several ranks.

# SGD: Adam would blow rounding up to full steps. Text-only records, padding on some ranks, accumulation, recomputing.
COMMON = (
    "--optim=sgd --learning_rate=0.1 --max_steps=6 --gradient_checkpointing=True --gradient_accumulation_steps=2 "
    "--per_device_train_batch_size=2 --train_sampling_strategy=random --seed=3 --logging_steps=2 "
    "--router_aux_loss_coef=0.05"
)
ENGINES = {"zero2": "--deepspeed=zero2.json", "zero3": "--deepspeed=zero3.json"}
KINDS = {
    "evaluated": (
        "--max_grad_norm=0 --eval_split=5 --eval_strategy=steps --eval_steps=3 --num_eval_generations=1 "
        "--eval_max_new_tokens=3 --logging_steps=3"
    ),
    "clipped": "--max_grad_norm=0.5 --gradient_checkpointing=False --moe_mode=dense --top_k_experts=1",
}
RESUMED = "--optim=adamw_torch --learning_rate=0.01 --save_strategy=steps --save_steps=2 --seed=5"


def launch(cases, directory, world_size=2, timeout_s=900):
    """Run resume_cases.py over all cases on ranks of this machine; return the results of each rank."""
    for name, case in cases.items():
        case["output"] = str(directory / name)
    (directory / "cases.json").write_text(json.dumps(cases))
    words = [WORKER, directory / "cases.json", directory / "results_RANK.json"]
    run_ranks(words, directory, world_size, timeout_s)
    return [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture
def flags_of(stage_flags, toy_data, tmp_path):
    data = toy_data(tmp_path / "data", num_records=48, text_only_every=3)

    def make(engine, ep_size, more):
        flags = stage_flags("moe", tmp_path / "unused", data=data)
        return [*flags, *COMMON.split(), ENGINES[engine], f"--ep_size={ep_size}", *more.split()]

    return make


def assert_same_run(one, two, name):
    """Compare what one rank saw of two runs."""
    assert two["samples"] == one["samples"], name
    assert any("loss" in line for line in one["log"])
    for line, other in zip(one["log"], two["log"], strict=True):
        assert without_clock(other) == pytest.approx(without_clock(line), rel=1e-5), name


def without_clock(line):
    """Return a line of the log without what depends on the clock."""
    return {key: value for key, value in line.items() if not key.endswith(("_runtime", "_per_second"))}


def assert_same_directory(one, two):
    """Compare the final directories of two runs: config, names, and weights to 1e-5."""
    weights, others = (load_file(directory / "model.safetensors") for directory in (one, two))
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in others.items()}
    far = {name: gap for name in weights if (gap := float((weights[name] - others[name]).abs().max())) > 1e-5}
    assert not far, two
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


def experts_log(directory):
    """Return the experts' metrics of metrics.jsonl, line by line."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["experts"] for line in lines if "experts" in line]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_expert_parallel_ranks_train_as_ranks_with_all_experts_do(engine, flags_of, tmp_path):
    cases = {
        f"{kind}_{ep_size}": {"argv": flags_of(engine, ep_size, more)}
        for kind, more in KINDS.items()
        for ep_size in (1, 2)
    }
    cases["resumed"] = {"argv": flags_of(engine, 2, RESUMED), "resume_from": [4]}
    ranks = launch(cases, tmp_path)
    for kind in KINDS:
        directories = [tmp_path / f"{kind}_{ep_size}" / "full" for ep_size in (1, 2)]
        for rank in ranks:
            assert_same_run(rank[f"{kind}_1"]["full"], rank[f"{kind}_2"]["full"], kind)
        assert_same_directory(*directories)
        one, two = map(experts_log, directories)
        assert one, "the experts are logged"
        for line, other in zip(one, two, strict=True):
            assert flat_report(other) == pytest.approx(flat_report(line), rel=1e-5)
    for rank in ranks:
        full, resumed = rank["resumed"]["full"], rank["resumed"]["4"]
        assert resumed["weights"] == full["weights"]
        assert resumed["log"] == full["log"]


@pytest.mark.slow
def test_two_groups_of_two_ranks_train_what_four_ranks_train(flags_of, tmp_path):
    cases = {
        f"{engine}_{ep_size}": {"argv": flags_of(engine, ep_size, KINDS["clipped"])}
        for engine in ENGINES
        for ep_size in (1, 2)
    }
    ranks = launch(cases, tmp_path, world_size=4)
    for engine in ENGINES:
        for rank in ranks:
            assert_same_run(rank[f"{engine}_1"]["full"], rank[f"{engine}_2"]["full"], engine)
        assert_same_directory(tmp_path / f"{engine}_1/full", tmp_path / f"{engine}_2/full")
