"""The documented steps, one after the other: three stages on toys, and what is refused before the first step."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava_lite import load
from llava_lite.export.merge import merge
from llava_lite.train.startup import start_logging
from llava_lite.train.train import main, train


@pytest.fixture
def mixed_data(toy_data, tmp_path):
    return toy_data(tmp_path / "mixed")


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.usefixtures("plots")
def test_three_stages_end_in_a_model_that_opens(run_stage, mixed_data, tmp_path):
    one, two, three = (tmp_path / f"stage{i}" for i in (1, 2, 3))
    run_stage("projector", one, "--num_train_epochs", 2)
    adapter = ["--pretrain_mm_mlp_adapter", one / "mm_projector.bin"]
    run_stage("full", two, *adapter, "--num_train_epochs", 2, "--group_by_modality_length", True, data=mixed_data)
    run_stage("moe", three, "--num_train_epochs", 2, data=mixed_data, model=two)
    for directory in (one, two, three):
        assert losses(directory)[-1] < losses(directory)[0]
    config = AutoConfig.from_pretrained(three)
    assert config.moe["moe_layers_idx"] == [0, 2]
    assert config.conv_template == "v1"
    assert config.image_aspect_ratio == "pad"
    assert AutoConfig.from_pretrained(one).conv_template == "plain"
    model = AutoModelForCausalLM.from_pretrained(three)
    tokenizer = AutoTokenizer.from_pretrained(three)
    ids = torch.tensor([[1, -200, *tokenizer("What is it?").input_ids[1:]]])
    assert model.generate(ids, images=torch.randn(1, 3, 32, 32), max_new_tokens=3).shape[1] <= 3
    assert {p.name for p in three.iterdir()} >= {"README.md", "mm_projector.bin", "loss.png", "expert_load.png"}


def test_connector_of_stage_one_is_where_stage_two_begins(run_stage, mixed_data, tmp_path):
    run_stage("projector", tmp_path / "one", "--max_steps", 1)
    path = tmp_path / "one/mm_projector.bin"
    saved = torch.load(path, weights_only=True)
    still = ["--learning_rate", 0, "--max_steps", 1, "--pretrain_mm_mlp_adapter", path]
    model = run_stage("full", tmp_path / "two", *still, data=mixed_data).model
    for name, weight in saved.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=0, atol=0)


def test_first_step_of_stage_three_has_the_loss_of_the_dense_model(run_stage, mixed_data, tmp_path):
    run_stage("full", tmp_path / "two", "--max_steps", 2, data=mixed_data)
    # Grouped, for the same records in both: drawing experts takes from the state that shuffles.
    still = ["--learning_rate", 0, "--max_steps", 1, "--router_aux_loss_coef", 0, "--group_by_modality_length", True]
    run_stage("full", tmp_path / "dense", *still, data=mixed_data, model=tmp_path / "two")
    run_stage("moe", tmp_path / "moe", *still, data=mixed_data, model=tmp_path / "two")
    assert losses(tmp_path / "moe") == pytest.approx(losses(tmp_path / "dense"), rel=1e-6)


def test_model_with_experts_is_tuned_further_without_new_ones(run_stage, mixed_data, tmp_path):
    run_stage("moe", tmp_path / "moe", "--max_steps", 1, data=mixed_data)
    trainer = run_stage("full", tmp_path / "more", "--max_steps", 1, data=mixed_data, model=tmp_path / "moe")
    assert {group.name for group in trainer.groups} == {"embeddings", "decoder", "mm_projector", "experts", "router"}


def test_connector_of_another_width_is_refused(stage_flags, mixed_data, tmp_path):
    path = tmp_path / "mm_projector.bin"
    shapes = {"0.weight": (48, 32), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    torch.save({f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=r"mm_projector.*\(48, 32\).*\(32, 32\)"):
        train(stage_flags("full", tmp_path / "out", "--pretrain_mm_mlp_adapter", path, data=mixed_data))


def test_entry_of_train_modules_that_trains_nothing_is_refused(stage_flags, mixed_data, tmp_path):
    with pytest.raises(ValueError, match="--train_modules fc1 trains nothing"):
        train(stage_flags("moe", tmp_path / "out", "--train_modules", "wg", "fc1", data=mixed_data))


def test_missing_image_is_named_before_the_first_step(stage_flags, mixed_data, tmp_path):
    from pathlib import Path

    (Path(mixed_data[1]) / "1.png").unlink()
    with pytest.raises(ValueError, match="toy_001"):
        train(stage_flags("full", tmp_path / "out", data=mixed_data))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_model_data_and_output_must_be_named(stage_flags, tmp_path):
    with pytest.raises(ValueError, match=r"--model_name_or_path \(.*\) and --data_path \(.*\) are needed"):
        train(["--output_dir", str(tmp_path), "--use_cpu", "True"])
    flags = stage_flags("full", tmp_path / "out")
    for flag in ("--data_path", "--output_dir"):
        at = flags.index(flag)
        with pytest.raises(ValueError, match=rf"^{flag} \(.*\) is needed"):
            train(flags[:at] + flags[at + 2 :])


@pytest.mark.parametrize("name", ["./checkpoints/gone", "/nowhere/vicuna", "a/b/c"])
def test_a_directory_that_is_not_there_is_named(name, stage_flags, mixed_data, tmp_path):
    flags = stage_flags("full", tmp_path / "out", data=mixed_data, model=name)
    with pytest.raises(OSError, match=f"--model_name_or_path '{name}': there is no such directory"):
        train(flags)


def test_language_model_without_a_tower_trains_on_text(toy_data, toy_llm_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    data = toy_data(tmp_path / "text", text_only_every=1)
    flags = (
        f"--model_name_or_path {toy_llm_dir('qwen2')} --data_path {data[0]} --output_dir {tmp_path / 'out'} "
        "--max_steps 2 --learning_rate 1e-3 --warmup_steps 0 --save_strategy no --disable_tqdm True"
    )
    main(flags.split())
    assert len(losses(tmp_path / "out")) == 2
    assert not (tmp_path / "out/mm_projector.bin").exists()


def test_half_precision_without_deepspeed_is_saved_in_half(run_stage, mixed_data, tmp_path):
    trainer = run_stage("full", tmp_path / "out", "--bf16", True, "--max_steps", 2, data=mixed_data)
    assert trainer.args.bf16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_records_held_out_are_not_trained_on(run_stage, mixed_data, tmp_path):
    trainer = run_stage("full", tmp_path / "out", "--eval_split", 0.25, "--max_steps", 1, data=mixed_data)
    supervised, held_out = (
        {part[i]["id"] for i in range(len(part))} for part in (trainer.train_dataset, trainer.eval_dataset)
    )
    assert (len(supervised), len(held_out)) == (18, 6)
    assert not supervised & held_out


def test_run_as_a_module_shows_what_trains(stage_flags, tmp_path):
    flags = stage_flags("projector", tmp_path / "one", "--max_steps", 1)
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.train.train", *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for words in ("what trains (--tuning projector)", "% of them supervised", "estimated memory of a rank"):
        assert words in done.stderr


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.WARNING)])
def test_first_rank_speaks_for_all_before_they_know_each_other(monkeypatch, rank, level):
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings():
        start_logging()
    assert logging.getLogger("llava_lite").level == level


def test_libraries_advice_to_one_another_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        start_logging()
        for module in ("torch.distributed.c10d_logger", "transformers.modeling_utils", "llava_lite.train.train"):
            warnings.warn_explicit("old name", FutureWarning, "x.py", 1, module=module, registry={})
    assert len(shown) == 1


def test_a_resumed_run_reports_its_checkpoint(run_stage, tmp_path, caplog):
    saving = ["--save_strategy", "steps", "--save_steps", 1]
    run_stage("projector", tmp_path / "one", *saving, "--max_steps", 1)
    assert "resuming from" not in caplog.text
    run_stage("projector", tmp_path / "one", *saving, "--max_steps", 2)
    assert f"resuming from {tmp_path}/one/checkpoint-1" in caplog.text


MORE = ["--learning_rate", "1e-3", "--max_steps", "2", "--version", "v1", "--tuning"]


@pytest.fixture
def with_experts(run_stage, mixed_data, tmp_path):
    """Return a function: base, flags -> the directory of a stage 3, of 2 experts in layers 1 and 2."""

    def make(*more):
        layers = ["--moe_layers_idx", 1, 2, "--num_experts", 2, "--top_k_experts", 1]
        run_stage("moe", tmp_path / "moe", "--max_steps", 1, *layers, *more, data=mixed_data)
        return tmp_path / "moe"

    return make


def continued(stage_flags, data, model, out, *more):
    """Return the trainer of a run that starts from a model with the tokens of MORE alone."""
    argv = stage_flags("full", out, data=data, model=model)
    # Without the flags of STAGES for the stage.
    return train([*argv[: argv.index("--tuning")], *MORE, *map(str, more)])


def test_more_of_stage_three_trains_what_stage_three_trains(with_experts, stage_flags, mixed_data, tmp_path):
    first = with_experts()
    fresh = train(
        [*stage_flags("moe", tmp_path / "fresh", data=mixed_data), "--max_steps=1", "--moe_layers_idx", "1", "2"]
    )
    start = AutoModelForCausalLM.from_pretrained(first).state_dict()
    trainer = continued(stage_flags, mixed_data, first, tmp_path / "more", "moe")
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in fresh.model.named_parameters() if weight.requires_grad}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert opened.config.moe["moe_layers_idx"] == [1, 2]
    assert (opened.config.moe["num_experts"], opened.config.moe["top_k_experts"]) == ([2, 2], 1)
    changed = {name for name, weight in opened.state_dict().items() if not torch.equal(weight, start[name])}
    assert changed == trained


def test_more_of_stage_three_begins_where_it_ended(with_experts, stage_flags, mixed_data, tmp_path):
    first = with_experts()
    still = ["--learning_rate", 0, "--max_steps", 1, "--group_by_modality_length", True]
    for tuning in ("full", "moe"):
        continued(stage_flags, mixed_data, first, tmp_path / f"more-{tuning}", tuning, *still)
    assert losses(tmp_path / "more-moe") == losses(tmp_path / "more-full")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (first, tmp_path / "more-moe")
    )
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_modules_that_train_are_chosen_again(with_experts, stage_flags, mixed_data, tmp_path):
    trainer = continued(stage_flags, mixed_data, with_experts(), tmp_path / "more", "moe", "--train_modules", "wg")
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {name for name in trained if "mm_projector" not in name} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)
    }


def test_other_experts_than_the_model_has_are_refused(with_experts, stage_flags, mixed_data, tmp_path):
    first = with_experts()
    with pytest.raises(ValueError, match="--moe_mode sparse, which is layers 0 2, and has experts in layers 1 2"):
        continued(stage_flags, mixed_data, first, tmp_path / "more", "moe", "--moe_mode", "sparse")
    assert not (tmp_path / "more/config.json").exists()


@pytest.mark.parametrize("is_merged", [True, False])
def test_lora_on_experts_is_no_end(is_merged, with_experts, stage_flags, mixed_data, tmp_path):
    first = with_experts()
    continued(stage_flags, mixed_data, first, tmp_path / "lora", "lora", "--lora_r", 4)
    last = tmp_path / "lora"
    if is_merged:
        last = tmp_path / "merged"
        merge(tmp_path / "lora", last, report=lambda line: None)
    start = load(last, device="cpu")[0].state_dict()
    trainer = continued(stage_flags, mixed_data, last, tmp_path / "more", "moe")
    assert {group.name for group in trainer.groups} == {"mm_projector", "experts", "router", "decoder"}
    found = load(tmp_path / "more", device="cpu")[0].state_dict()
    assert torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"], start["model.layers.0.self_attn.q_proj.weight"]
    )
    assert not torch.equal(
        found["model.layers.1.mlp.experts.down_proj"], start["model.layers.1.mlp.experts.down_proj"]
    )
