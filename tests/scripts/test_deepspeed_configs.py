"""The DeepSpeed configs: every key is one that DeepSpeed reads, and nothing overrules a recipe."""

import json
from pathlib import Path

import pytest

from llava_lite.train.deepspeed.files import CONFIGS as NAMES
from llava_lite.train.deepspeed.files import DIRECTORY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted([*ROOT.glob("zero*.json"), *(ROOT / "scripts").glob("zero*.json")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_deepspeed_reads_every_key_of_a_config(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(path.read_text())
    stage = int(path.name[len("zero")])
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    # Its reader refuses a key that it does not know.
    assert DeepSpeedZeroConfig(**zero).stage == stage
    assert not {"optimizer", "scheduler"} & set(config), "they would overrule the recipe's rates and its cosine"


def test_the_package_carries_each_config_byte_for_byte():
    packaged = {path.name: path.read_bytes() for path in DIRECTORY.iterdir() if path.suffix == ".json"}
    assert packaged == {path.name: path.read_bytes() for path in CONFIGS}
    assert sorted(packaged) == sorted(f"{name}.json" for name in NAMES)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_clipping_is_what_the_flag_says(max_grad_norm, tmp_path):
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    args = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=max_grad_norm, use_cpu=True)
    config = HfTrainerDeepSpeedConfig(str(ROOT / "zero2.json"))
    config.trainer_config_process(args)
    unset_hf_deepspeed_config()
    assert config.config["gradient_clipping"] == max_grad_norm
