"""Flags that cannot both hold are refused, and both are named."""

import logging
from types import SimpleNamespace

import pytest

from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.arguments.validate import check_skipped_steps

PAIRS = {
    "--tune_mm_mlp_adapter True --lora_enable True": ("tune_mm_mlp_adapter", "lora_enable"),
    "--tuning full --moe_enable True": ("tuning full", "moe_enable"),
    "--tuning projector --freeze_mm_mlp_adapter True": ("tuning projector", "freeze_mm_mlp_adapter"),
    "--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True": ("tuning projector", "freeze_mm_mlp_adapter"),
    "--tuning projector --unfreeze_mm_vision_tower True": ("tuning projector", "unfreeze_mm_vision_tower"),
    "--tuning bias_norm --bias_connector True --freeze_mm_mlp_adapter True": ("bias_connector", "freeze_mm_mlp"),
    "--tuning lora --bias_connector True": ("bias_connector True", "--tuning is lora", "--tuning bias_norm"),
    "--bits 4 --tuning full": ("bits 4", "lora_enable"),
    "--mm_projector_lr 1e-5 --freeze_mm_mlp_adapter True": ("mm_projector_lr", "freeze_mm_mlp_adapter"),
    "--mm_vision_tower_lr 1e-5": ("mm_vision_tower_lr", "unfreeze_mm_vision_tower"),
    "--train_modules wg": ("train_modules wg", "moe_enable"),
    "--num_experts 4 --tuning full": ("num_experts 4", "tuning full"),
    "--freeze_backbone True --lora_enable True": ("freeze_backbone", "tuning lora"),
    "--eval_split 0.1 --eval_data_path x.json": ("eval_data_path", "eval_split"),
    "--eval_strategy steps": ("eval_strategy steps", "eval_data_path"),
    "--group_by_modality_length True --group_by_length True": ("group_by_modality_length", "train_sampling_strategy"),
    "--top_k_experts 5 --moe_enable True": ("top_k_experts 5", "num_experts 4"),
    "--moe_enable True --ep_size 2": ("ep_size 2", "deepspeed zero2 or zero3"),
    "--fp16 True --bf16 True --use_cpu True": ("bf16 True", "fp16 True"),
    "--moe_enable True --moe_second_expert_sampling always --top_k_experts 1": (
        "moe_second_expert_sampling always",
        "top_k_experts",
    ),
    "--label_smoothing_factor 0.1": ("label_smoothing_factor 0.1",),
    "--packing tokens --per_device_train_batch_size 4": ("packing tokens", "per_device_train_batch_size 4"),
    "--packing tokens --per_device_train_batch_size 1 --packing_tokens 0": ("packing_tokens 0",),
    "--max_bad_fraction -1": ("max_bad_fraction -1", "0 to 1"),
    "--max_skipped_steps -1": ("max_skipped_steps -1", "at least 0"),
    "--max_skipped_steps 2 --fp16 True --use_cpu True": ("max_skipped_steps 2", "fp16 True"),
    "--max_skipped_steps 2 --optim schedule_free_adamw": ("max_skipped_steps 2", "schedule_free_adamw"),
    "--gradient_accumulation_steps 0": ("gradient_accumulation_steps 0", "at least 1"),
    "--per_device_train_batch_size 0": ("per_device_train_batch_size 0", "at least 1"),
    "--packing samples --moe_enable True --moe_count_padding True": ("packing samples", "moe_count_padding True"),
}


@pytest.mark.parametrize("output", PAIRS)
def test_both_flags_are_named(output, tmp_path, device_without):
    device_without("tf32")
    with pytest.raises(ValueError, match="--") as error:
        parse_args([*output.split(), "--output_dir", str(tmp_path)])
    for name in PAIRS[output]:
        assert name in str(error.value)


def test_reentrant_checkpointing_with_experts_is_refused(tmp_path):
    output = ["--moe_enable", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    with pytest.raises(ValueError, match=r'--tuning moe needs .*"use_reentrant": false.*got.*"use_reentrant": true'):
        parse_args([*output, "--output_dir", str(tmp_path)])


def test_unknown_template_is_refused_with_the_list(tmp_path):
    with pytest.raises(ValueError, match=r"v9.*plain") as error:
        parse_args(["--version", "v9", "--output_dir", str(tmp_path)])
    assert "v1" in str(error.value)


def test_unknown_aspect_ratio_is_refused_with_the_list(tmp_path):
    with pytest.raises(ValueError, match="unknown --image_aspect_ratio 'round'; known: square, pad, anyres"):
        parse_args(["--image_aspect_ratio", "round", "--output_dir", str(tmp_path)])


def test_logger_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="--report_to wandb: not installed; pip install wandb, or drop it"):
        parse_args(["--report_to", "wandb", "--output_dir", str(tmp_path)])
    parse_args(["--report_to", "tensorboard", "--output_dir", str(tmp_path)])


def test_flags_that_the_run_does_not_use_are_reported(tmp_path, caplog):
    def reported(output):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="llava_lite"):
            parse_args([*output.split(), "--output_dir", str(tmp_path)])
        return [line for line in caplog.messages if "has no effect" in line]

    assert reported("--lora_r 128 --use_residual True") == [
        "--use_residual True has no effect: --tuning full makes no experts.",
        "--lora_r 128 has no effect: --tuning full has no adapters.",
    ]
    assert reported("--moe_enable True --capacity_factor 1.5 --moe_mode sparse") == [
        "--capacity_factor 1.5 has no effect: without --moe_drop_tokens True no token is dropped, unless the model's "
        "own experts drop some already."
    ]
    assert reported("--moe_enable True --capacity_factor 1.5 --moe_drop_tokens True --use_residual True") == []
    assert reported("--lora_enable True --lora_r 128 --lora_alpha 256") == []
    packs = "--packing tokens --per_device_train_batch_size 1"
    assert reported(f"{packs} --group_by_modality_length True") == [
        "--group_by_modality_length True has no effect: packs of --packing tokens are about equally long, in an order "
        "of their own."
    ]
    assert reported("--packing_tokens 100") == [
        "--packing_tokens 100 has no effect: --packing samples counts records."
    ]
    assert reported(f"{packs} --packing_tokens 100") == []


def test_records_stand_in_one_row_unless_a_flag_needs_padding(tmp_path):
    def chosen(output=""):
        args = parse_args([*output.split(), "--output_dir", str(tmp_path)])[2]
        return args.packing, args.packing_tokens

    assert chosen() == ("samples", None)
    assert chosen("--packing none") == chosen("--moe_enable True --moe_count_padding True") == ("none", None)
    assert chosen("--torch_compile True") == ("none", None)
    # Of no meaning without experts.
    assert chosen("--moe_count_padding True") == ("samples", None)
    packs = "--packing tokens --per_device_train_batch_size 1 --model_max_length 100"
    assert chosen(packs) == ("tokens", 400)
    assert chosen(f"{packs} --packing_tokens 150") == ("tokens", 150)


def test_two_precisions_are_refused_also_where_the_machine_has_neither(tmp_path, device_without):
    device_without("bf16", "tf32", "fp16")
    with pytest.raises(ValueError, match="--bf16 True and --fp16 True contradict each other"):
        parse_args(["--bf16", "True", "--fp16", "True", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("output", ["False", "false", "no", "off"])
def test_features_are_off_as_yaml_says_it(output, tmp_path):
    assert parse_args(["--feature_cache", output, "--output_dir", str(tmp_path)])[1].feature_cache == "off"


def test_pinpoints_need_anyres_and_are_read_at_once(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--image_grid_pinpoints"]
    with pytest.raises(
        ValueError, match=r"--image_grid_pinpoints \(1x1\),\(2x2\) and --image_aspect_ratio pad contra"
    ):
        parse_args([*flags, "(1x1),(2x2)", "--image_aspect_ratio", "pad"])
    with pytest.raises(ValueError, match="'336' are not resolutions"):
        parse_args([*flags, "336", "--image_aspect_ratio", "anyres"])
    _, data_args, _ = parse_args([*flags, "[(336, 672), (672, 336)]", "--image_aspect_ratio", "anyres"])
    assert data_args.config_choices() == {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[(336, 672), (672, 336)]",
    }


NO_CHECK = {"bf16": {"check_grad_overflow": False}}


def skipping(stage, uses_bf16, **config):
    """The arguments of a DeepSpeed run that may leave out steps."""
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(
        max_skipped_steps=2, fp16=False, bf16=uses_bf16, optim="adamw_torch", uses_deepspeed=True, zero_stage=stage,
        deepspeed_plugin=plugin,
    )  # fmt: skip


def test_an_engine_that_leaves_no_step_out_is_refused():
    with pytest.raises(ValueError, match="--max_skipped_steps 2 with DeepSpeed needs ZeRO"):
        check_skipped_steps(skipping(0, False))
    with pytest.raises(ValueError, match='--max_skipped_steps 2 needs "check_grad_overflow": true'):
        check_skipped_steps(skipping(2, True, **NO_CHECK))
    check_skipped_steps(skipping(2, True))
    check_skipped_steps(skipping(3, True, **NO_CHECK))
