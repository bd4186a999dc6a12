"""Each recipe takes the trajectory that is kept in tests/golden, and so does each variant that changes no number.

docs/testing.md says how the files are renewed. The start of every run is drawn by this file from the names of the
weights: it does not depend on the order in which a version of a library initialises its modules.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.recipes import COMMON, NUM_STEPS, NUM_VARIANT_STEPS, RECIPES
from rank_launcher import launch
from transformers import TrainerCallback

from llava_lite.train.train import prepare, run

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Measured: at most 1.5e-6 between variants, 3.5e-6 between AVX-512 and AVX2, 2.1e-5 without vectors (the gradient norm
# of stage 1).
RTOL = 1e-4
VARIANTS = [(name, variant) for name, recipe in RECIPES.items() for variant in recipe.variants]


def draw_weights(model):
    """Fill the weights that train, and are not constant, with numbers that depend on their names only."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.numel() > 1 and weight.std() > 0:
                draw = np.random.default_rng(zlib.crc32(name.encode()))
                weight.copy_(torch.from_numpy(draw.standard_normal(tuple(weight.shape), np.float32)) * 0.1)


def trajectory(flags, *callbacks):
    """Return {"loss", "grad_norm", "tokens"} of each step of a run."""
    stage = prepare(flags)
    draw_weights(stage.trainer.model)
    for callback in callbacks:
        stage.trainer.add_callback(callback)
    log = [line for line in run(stage).state.log_history if "loss" in line]
    return {key: [line[key] for line in log] for key in ("loss", "grad_norm", "tokens")}


@pytest.fixture
def follow(stage_flags, tmp_path):
    """Return a function: name of a recipe, more flags -> its trajectory."""

    def make(name, num_steps, more="", *callbacks):
        recipe = RECIPES[name]
        words = f"{COMMON} {recipe.flags} {more} --max_steps {num_steps}"
        words = words.replace("FEATURES", str(tmp_path / "features"))
        return trajectory(stage_flags(recipe.stage, tmp_path / "out", *words.split()), *callbacks)

    return make


def check(found, golden, num_steps):
    """Compare the first steps of a trajectory with the file's."""
    assert found["tokens"][:num_steps] == golden["tokens"][:num_steps], "other records, or another order"
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key][:num_steps], golden[key][:num_steps], rtol=RTOL, err_msg=key)


def read(name):
    """Return the kept trajectory of a recipe."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_trajectory_that_is_kept(name, follow, request):
    found = follow(name, NUM_STEPS)
    if request.config.getoption("--renew-golden"):
        (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    check(found, read(name), NUM_STEPS)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_variant_takes_the_trajectory_of_its_recipe(name, variant, follow):
    check(follow(name, NUM_VARIANT_STEPS, RECIPES[name].variants[variant]), read(name), NUM_VARIANT_STEPS)


class AThousandthMore(TrainerCallback):
    """Let every gradient of one step be larger by a thousandth."""

    def __init__(self, step):
        self.step, self.handles = step, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Change the gradients of this step."""
        if state.global_step == self.step:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            self.handles = [weight.register_hook(lambda grad: grad * 1.001) for weight in weights]

    def on_step_end(self, *args, **kwargs):
        """Leave the next ones as they are."""
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", ["pretrain", "moe"])
def test_a_thousandth_in_one_step_is_found(name, follow):
    found = follow(name, NUM_VARIANT_STEPS, "", AThousandthMore(5))
    with pytest.raises(AssertionError, match="grad_norm"):
        check(found, read(name), NUM_VARIANT_STEPS)
    check(found, read(name), 5)


def test_every_file_belongs_to_a_recipe():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(RECIPES)


@pytest.fixture
def start(stage_flags, tmp_path):
    """Return a function: name of a recipe -> directory of the model that its runs start from."""

    def make(name):
        stage = prepare(stage_flags(RECIPES[name].stage, tmp_path / f"prepared_{name}"))
        draw_weights(stage.trainer.model)
        stage.trainer.model.save_pretrained(tmp_path / f"start_{name}")
        stage.trainer.processing_class.save_pretrained(tmp_path / f"start_{name}")
        return tmp_path / f"start_{name}"

    return make


@pytest.mark.slow
def test_two_ranks_take_the_trajectory_of_one_process(start, stage_flags, tmp_path):
    cases = []
    for name in (name for name, recipe in RECIPES.items() if recipe.ranks):
        directory = start(name)
        for engine in ("zero2", "zero3"):
            words = f"{COMMON} {RECIPES[name].flags} --max_steps {NUM_VARIANT_STEPS} --per_device_train_batch_size 2"
            words += f" --deepspeed {engine}.json"
            flags = stage_flags(RECIPES[name].stage, tmp_path / f"{name}_{engine}", *words.split(), model=directory)
            cases.append({"name": f"{name}_{engine}", "argv": flags})
    for case, ranks in launch(cases, tmp_path).items():
        for found in ranks:
            assert "error" not in found, found
            check(found, read(case.rpartition("_")[0]), NUM_VARIANT_STEPS)
