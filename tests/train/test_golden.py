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

from llava_lite.train.train import prepare, run

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RTOL = 1e-4
VARIANTS = [(name, variant) for name, recipe in RECIPES.items() for variant in recipe.variants]


def draw_weights(model):
    """Fill the weights that train, and are not constant, with numbers that depend on their names only."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.numel() > 1 and weight.std() > 0:
                draw = np.random.default_rng(zlib.crc32(name.encode()))
                weight.copy_(torch.from_numpy(draw.standard_normal(tuple(weight.shape), np.float32)) * 0.1)


def trajectory(flags):
    """Return {"loss", "grad_norm", "tokens"} of each step of a run."""
    stage = prepare(flags)
    draw_weights(stage.trainer.model)
    log = [line for line in run(stage).state.log_history if "loss" in line]
    return {key: [line[key] for line in log] for key in ("loss", "grad_norm", "tokens")}


@pytest.fixture
def follow(stage_flags, tmp_path):
    """Return a function: name of a recipe, more flags -> its trajectory."""

    def make(name, num_steps, more=""):
        recipe = RECIPES[name]
        words = f"{COMMON} {recipe.flags} {more} --max_steps {num_steps}"
        words = words.replace("FEATURES", str(tmp_path / "features"))
        return trajectory(stage_flags(recipe.stage, tmp_path / "out", *words.split()))

    return make


def check(found, golden, num_steps):
    """Compare the first steps of a trajectory with the file's."""
    assert found["tokens"] == golden["tokens"][:num_steps], "other records, or another order"
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], golden[key][:num_steps], rtol=RTOL, err_msg=key)


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
