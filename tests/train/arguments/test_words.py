"""Flags of other programs, and guesses, are answered with the flag that is meant here."""

import re
from importlib import import_module

import pytest

from llava_lite.cli import VERBS
from llava_lite.train.arguments.parse import build_parser
from llava_lite.train.arguments.words import OURS, meant_by, unknown_flags, words_left

# Command -> (flag that somebody writes, what is answered).
ANSWERS = {
    "train": {
        "--model": "--model_name_or_path",
        "--model-path": "--model_name_or_path",
        "--base_model": "--model_name_or_path",
        "--data": "--data_path",
        "--dataset": "--data_path",
        "--train_file": "--data_path",
        "--epochs": "--num_train_epochs",
        "--num_epochs": "--num_train_epochs",
        "--lr": "--learning_rate",
        "--LR": "--learning_rate",
        "--batch_size": "--per_device_train_batch_size",
        "--micro_batch_size": "--per_device_train_batch_size",
        "--grad_accum": "--gradient_accumulation_steps",
        "--output": "--output_dir",
        "--save_dir": "--output_dir",
        "--images": "--image_folder",
        "--image-dir": "--image_folder",
        "--tower": "--vision_tower",
        "--projector": "--pretrain_mm_mlp_adapter",
        "--max_seq_length": "--model_max_length",
        "--cutoff_len": "--model_max_length",
        "--warmup": "--warmup_steps (below 1 a fraction of all steps)",
        "--lora": "--tuning lora",
        "--lora_rank": "--lora_r",
        "--qlora": "--tuning lora --bits 4",
        "--finetuning_type": "--tuning projector, full, lora or moe",
        "--resume": "--resume_from_checkpoint",
        "--val_size": "--eval_split",
        "--conv_mode": "--version",
        "--wandb": "--report_to wandb, or tensorboard",
        "--num_experts_per_tok": "--top_k_experts",
        "--new_special_tokens": "--new_tokens",
        # Only spelled alike.
        "--lerning_rate": "--learning_rate",
        "--image_foldr": "--image_folder",
    },
    "check": {
        "--model": "--model_name_or_path",
        "--data": "--data_path",
        "--images": "--image_folder",
        "--image_dir": "--image_folder",
        "--output": "--bad_records_file",
        "--max_length": "--model_max_length",
        "--conv-mode": "--version",
        "--num_workrs": "--num_workers",
    },
    "chat": {
        "--model": "the model as the first word, llava-lite chat MODEL",
        "--model_name_or_path": "the model as the first word, llava-lite chat MODEL",
        "--image": "--image-file",
        "--images": "--image-file",
        "--image-path": "--image-file",
        "--base_model": "--model-base",
        "--load_in_4bit": "--load-4bit",
        "--max_tokens": "--max-new-tokens",
        "--version": "--conv-mode",
        "--temprature": "--temperature",
    },
    "convert": {
        "--model": "the model as the first word, llava-lite convert SOURCE TARGET",
        "--output_dir": "the new directory as the second word, llava-lite convert SOURCE TARGET",
        "--torch_dtype": "--dtype",
        "--repo_id": "--push-to-hub",
    },
    "merge": {
        "--model": "--model-path, or the first word of llava-lite merge SOURCE TARGET",
        "--base": "--model-base",
        "--output": "--save-model-path, or the second word of llava-lite merge SOURCE TARGET",
        "--adapter": "--model-path, or the first word of llava-lite merge SOURCE TARGET",
    },
    "push": {
        "--repo": "the repository as the second word, llava-lite push DIRECTORY USER/NAME",
        "--model": "the directory as the first word, llava-lite push DIRECTORY USER/NAME",
        "--model-base": "--base",
    },
    "eval": {
        "--model": "--model-path",
        "--image": "--image-file",
        "--prompt": "--query",
        "--max_tokens": "--max_new_tokens",
    },
    "benchmark": {
        "--model-path": "--model",
        "--data-dir": "--data",
        "--conv-template": "--conv-mode",
        "--per_device_batch_size": "--batch-size",
        "--gpus": "it for the launcher: torchrun --nproc_per_node N -m llava_lite.cli eval ...",
    },
    "answer": {
        "--model-path": "the model as the first word, llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl",
        "--question-file": "the file of questions as the second word, llava-lite answer MODEL QUESTIONS.jsonl "
        "OUT.jsonl",
        "--answers-file": "the file of answers as the third word, llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl",
        "--img-dir": "--image-folder",
        "--max_tokens": "--max-new-tokens",
    },
}
TABLE = [(command, flag, answer) for command, flags in ANSWERS.items() for flag, answer in flags.items()]
MODULES = {verb: module for verb, (module, _) in VERBS.items()}
MODULES |= {"eval": "llava_lite.eval.run_llava", "benchmark": "llava_lite.commands.eval"}


def flags_of(command, capsys):
    """Return the flags that the help page of a command lists."""
    if command in ("train", "plan"):
        page = build_parser().format_help()
    else:
        with pytest.raises(SystemExit):
            import_module(MODULES[command]).main(["--help"])
        page = capsys.readouterr().out
    return set(re.findall(r"--[A-Za-z][\w-]*", page))


@pytest.mark.parametrize(("command", "flag", "answer"), TABLE)
def test_flag_is_answered_with_the_one_that_is_meant(command, flag, answer, capsys):
    flags = flags_of(command, capsys)
    assert flag not in flags
    assert meant_by(command, flag, flags) == answer


@pytest.mark.parametrize("command", sorted(set(OURS) - {"plan"}))
def test_answers_name_flags_that_exist(command, capsys):
    flags = flags_of(command, capsys)
    for meaning, answer in OURS[command].items():
        named = {flag for flag in re.findall(r"--[A-Za-z][\w-]*", answer) if "launcher" not in answer}
        # `check` has no flag for the tower; until it has one, none is suggested.
        assert named <= flags or (command, meaning) == ("check", "tower"), (meaning, answer)


def test_a_flag_that_the_command_lacks_is_not_advised():
    assert meant_by("check", "--vit", ["--data_path"]) is None
    assert meant_by("check", "--vit", ["--vision_tower"]) == "--vision_tower"


def test_several_unknown_flags_are_answered_at_once_and_each_once():
    assert unknown_flags("train", ["--lr=3", "--epochs", "--lr", "--xyzzy"], ["--seed"]) == (
        "unknown flag --lr. unknown flag --epochs. unknown flag --xyzzy."
    )
    known = ["--learning_rate", "--num_train_epochs"]
    assert unknown_flags("train", ["--lr=3", "--epochs", "--lr", "--xyzzy"], known) == (
        "unknown flag --lr: write --learning_rate. unknown flag --epochs: write --num_train_epochs. "
        "unknown flag --xyzzy."
    )


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["dir"], "'dir' belongs to no flag. Put quotes around a value with spaces."),
        (["-lr", "3"], "unknown flag -lr: write --learning_rate."),
        (["-3"], "'-3' belongs to no flag. Put quotes around a value with spaces."),
    ],
)
def test_words_after_no_flag_are_reported(words, answer):
    assert words_left("train", words) == answer
