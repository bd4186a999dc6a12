"""The YAML examples are runs that parse, and those of the stages have the recipes' flags."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from pages import ROOT

from llava_lite.train.arguments.parse import parse_args

EXAMPLES = sorted((ROOT / "docs/examples").glob("*.yaml"))
RECIPE_OF = {"pretrain": "pretrain", "finetune": "finetune", "lora": "finetune_lora", "moe": "moe-finetune"}
VARIABLES = {
    "DATA_ROOT": "/data",
    "PROJECTOR": "checkpoints/pretrain/mm_projector.bin",
}
OUTPUTS = {"pretrain": "pretrain", "finetune": "llava", "lora": "llava-lora", "moe": "llava-moe"}
ALL_TUNINGS = {"pretrain": "projector", "finetune": "full", "lora": "lora", "moe": "moe"}
CPU = ["--use_cpu", "True"]


def parsed(words):
    """Return the fields of a run as one dict, without what differs from machine to machine."""
    groups = parse_args([*words, *CPU])
    fields = {name: value for group in groups for name, value in vars(group).items() if not name.startswith("_")}
    # `given` are the names of the flags; without dropped tokens a capacity has no effect.
    other = ("deepspeed", "deepspeed_plugin", "hf_deepspeed_config", "distributed_state", "given", "capacity_factor")
    return {name: value for name, value in fields.items() if name not in other}


def flags_of_example(path):
    """Return the words of an example without its DeepSpeed config, and that config's name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = []
    for name, value in content.items():
        if name != "deepspeed":
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words, content.get("deepspeed")


def flags_of_recipe(name, output, directory, model=None):
    """Return the words that a recipe hands to training without its DeepSpeed config, and that config's path."""
    launcher = directory / "deepspeed"
    launcher.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    launcher.chmod(0o755)
    more = {"OUTPUT": f"checkpoints/{output}"} | ({"MODEL": model} if model else {})
    env = {**os.environ, **VARIABLES, **more, "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", f"scripts/v1_5/{name}.sh"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    at = words.index("--deepspeed")
    return words[at + 2 :], words[at + 1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_parses_as_llava_lite_train_reads_it(path):
    words, config = flags_of_example(path)
    assert config in (None, "zero2", "zero3")
    fields = parsed(words)
    assert fields["tuning"] == ALL_TUNINGS.get(path.stem, fields["tuning"])
    assert path.read_text(encoding="utf-8").startswith("# "), "an example begins with what it is"


@pytest.mark.parametrize("name", RECIPE_OF)
def test_example_of_a_stage_is_its_recipe(name, tmp_path):
    words, config = flags_of_example(ROOT / f"docs/examples/{name}.yaml")
    model = "checkpoints/llava" if name == "moe" else None
    of_recipe, config_of_recipe = flags_of_recipe(RECIPE_OF[name], OUTPUTS[name], tmp_path, model)
    assert config_of_recipe == str(ROOT / f"{config}.json")
    ours, theirs = parsed(words), parsed(of_recipe)
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert {key: (ours[key], theirs[key]) for key in differing} == {}


def test_page_shows_every_example():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f'--8<-- "examples/{path.name}"' not in page] == []
