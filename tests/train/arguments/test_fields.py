"""Flags become arguments: those of the published scripts, those of a YAML file, and what the machine supports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_lite.train.arguments.fields import ModelArguments, TrainingArguments
from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.deepspeed.files import read_deepspeed

ROOT = Path(__file__).parents[3]
# LLaVA scripts/v1_5/pretrain.sh and finetune_lora.sh, MoE-LLaVA scripts/v1/phi2/finetune_moe.sh, flag by flag.
COMMON = (
    "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --tf32 True "
    "--num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy no --save_strategy steps "
    "--save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
    "--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True "
    "--model_name_or_path m --data_path a.json --image_folder f"
)
PRETRAIN = (
    f"{COMMON} --version plain --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu "
    "--tune_mm_mlp_adapter True --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --save_steps 24000 "
    "--learning_rate 1e-3"
)
LORA = (
    f"{COMMON} --version v1 --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 "
    "--pretrain_mm_mlp_adapter p.bin --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-4 "
    "--bits 4"
)
MOE = (
    f"{COMMON} --version phi --moe_enable True --num_experts 4 --top_k_experts 2 --capacity_factor 1.5 "
    "--moe_mode sparse --use_residual False --router_aux_loss_coef 0.01 --train_modules fc1 fc2 wg --image_tower t "
    "--image_projector_type mlp2x_gelu --cache_dir ./cache_dir --gradient_accumulation_steps 2"
)


def parse(text, tmp_path):
    return parse_args([*text.split(), "--output_dir", str(tmp_path)])


def test_pretrain_script_of_llava_trains_the_projector(tmp_path):
    model_args, data_args, training_args = parse(PRETRAIN, tmp_path)
    assert training_args.tuning == "projector"
    assert model_args.mm_projector_type == "mlp2x_gelu"
    assert data_args.data_path == ["a.json"]
    assert training_args.warmup_steps == 0.03
    assert training_args.eval_strategy.value == "no"
    assert training_args.gradient_checkpointing is True


def test_lora_script_of_llava(tmp_path):
    _, data_args, training_args = parse(LORA, tmp_path)
    assert (training_args.tuning, training_args.lora_r, training_args.bits) == ("lora", 128, 4)
    assert training_args.mm_projector_lr == 2e-5
    assert data_args.image_aspect_ratio == "pad"


def test_moe_script_of_moe_llava(tmp_path):
    model_args, _, training_args = parse(MOE, tmp_path)
    assert training_args.tuning == "moe"
    assert model_args.vision_tower == "t"
    assert model_args.mm_projector_type == "mlp2x_gelu"
    moe = model_args.moe_config()
    assert moe["num_experts"] == [4]
    assert moe["train_modules"] == ["fc1", "fc2", "wg"]
    assert moe["capacity_factor"] == 1.5
    assert moe["moe_mode"] == "sparse"


def test_moe_config_is_one_that_the_model_reads():
    from llava_lite.model.moe.config import read_moe_config

    read = read_moe_config(ModelArguments(moe_enable=True, moe_second_expert_sampling="always").moe_config(), 8)
    assert read.layers == (4, 5, 6, 7)
    assert read.moe_second_expert_sampling == "always"


def test_yaml_and_flags_that_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  model_name_or_path: m\n  version: plain\n  tune_mm_mlp_adapter: true\n"
        "data_path: [a.json, b.json]\nlearning_rate: 1.0e-3\nwarmup_ratio: 0.1\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nseed: null\n"
    )
    model_args, data_args, training_args = parse_args(
        [str(path), "--learning_rate", "5e-4", "--output_dir", str(tmp_path)]
    )
    assert model_args.version == "plain"
    assert training_args.tuning == "projector"
    assert data_args.data_path == ["a.json", "b.json"]
    assert training_args.learning_rate == 5e-4
    assert training_args.warmup_steps == 0.1
    assert training_args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_yaml_is_read_after_the_rank_that_deepspeed_puts_first(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1.0e-3\nseed: 3\n")
    training_args = parse_args(["--local_rank=0", str(path), "--seed", "4", "--output_dir", str(tmp_path)])[2]
    assert (training_args.learning_rate, training_args.seed) == (1e-3, 4)


def test_yaml_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected lines of `flag: value`, got list"):
        parse_args([str(path)])


def test_unknown_flag_is_refused_with_the_likely_one(tmp_path):
    with pytest.raises(ValueError, match=r"unknown flag --lerning_rate: write --learning_rate\."):
        parse("--lerning_rate 1", tmp_path)


def test_error_in_a_value_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="invalid choice: 'flash'") as error:
        parse("--attn_implementation flash", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_word_that_belongs_to_no_flag_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"'dir' belongs to no flag\. Put quotes"):
        parse("--run_name my dir", tmp_path)


def test_tuning_by_name_equals_tuning_by_old_flag(tmp_path):
    by_name, by_flag = parse("--tuning projector", tmp_path), parse("--tune_mm_mlp_adapter True", tmp_path)
    assert by_name[0].tune_mm_mlp_adapter is by_flag[0].tune_mm_mlp_adapter is True
    assert by_name[2].tuning == by_flag[2].tuning == "projector"
    assert parse("--seed 1", tmp_path)[2].tuning == "full"


def test_bf16_comes_from_the_deepspeed_json_where_it_says(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.bf16 is False
    args.deepspeed = {"bf16": {"enabled": True}}
    assert args.default_bf16() is True
    args.deepspeed = {"bf16": {"enabled": "auto"}}
    assert args.default_bf16() is False


def test_bf16_comes_from_accelerate_where_it_launches(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert args.default_bf16() is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert args.default_bf16() is False


def test_deepspeed_config_by_path_text_and_table(tmp_path):
    table = {"zero_optimization": {"stage": 3}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(table))
    assert read_deepspeed(str(path)) == read_deepspeed(json.dumps(table)) == read_deepspeed(table) == table
    assert read_deepspeed(None) == {}


def test_importing_arguments_imports_neither_models_nor_deepspeed():
    code = (
        "import sys, llava_lite.train.arguments.fields; "
        "print([m for m in ('deepspeed', 'datasets', 'matplotlib', 'llava_lite.model') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def test_a_rank_on_a_cpu_has_a_device_that_tensors_can_be_restored_to(tmp_path, monkeypatch):
    import torch
    import transformers

    monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda self: torch.device("cpu", 0)))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    path = tmp_path / "state.pt"
    torch.save({"step": torch.ones(1)}, path)
    assert torch.equal(torch.load(path, map_location=args.device)["step"], torch.ones(1))
