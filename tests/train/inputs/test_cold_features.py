"""The run that fills the feature cache is the run that finds it filled, and, image by image, the one without."""

import random
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_lite.data.errors import DataError
from llava_lite.train.inputs import feature_fill
from llava_lite.train.train import train

KEYS = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "moe_loss")
SETTINGS = {
    "plain": ("full", "--max_steps", 4),
    "two workers": ("full", "--max_steps", 4, "--dataloader_num_workers", 2),
    "epochs": ("projector", "--num_train_epochs", 2),
    "packs": ("full", "--packing", "tokens", "--packing_tokens", 160, "--num_train_epochs", 2),
    "lora with dropout": ("lora", "--lora_dropout", 0.3, "--max_steps", 4),
    "experts": ("moe", "--max_steps", 4),
    "evaluation": (
        *("full", "--max_steps", 4, "--eval_split", 4, "--eval_strategy", "steps", "--eval_steps", 2),
        *("--num_eval_generations", 1, "--eval_max_new_tokens", 3),
    ),
}


@pytest.fixture
def run(stage_flags, toy_data, tmp_path):
    """Return a function: name, setting, more flags -> all that a run leaves: weights, log, random states."""
    data = toy_data(tmp_path / "mixed")

    def go(name, setting, *more):
        stage, *flags = SETTINGS[setting]
        flags += ["--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1, "--report_to", "none"]
        # One image a call of the tower.
        flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
        # A run begins in a new process: nothing may hang on the random state that the last one left.
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7777)
        trainer = train(stage_flags(stage, tmp_path / name, *flags, *more, data=data))
        log = [{key: line[key] for key in KEYS if key in line} for line in trainer.state.log_history]
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        return weights, log, (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())

    return go


def assert_same(one, other):
    """Compare weights bit for bit, the log, and the random states of torch, NumPy and Python."""
    assert one[0].keys() == other[0].keys()
    assert [name for name, weight in one[0].items() if not torch.equal(weight, other[0][name])] == []
    assert one[1] == other[1]
    assert [a == b for a, b in zip(one[2], other[2], strict=True)] == [True] * 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_run_that_fills_the_cache_trains_what_the_next_one_does(run, tmp_path, setting):
    store = ("--feature_cache", tmp_path / "store")
    cold = run("cold", setting, *store)
    assert list((tmp_path / "store").rglob("*.bin"))
    assert_same(cold, run("warm", setting, *store))


# A pack shows the tower several images at once, which kernels may round otherwise than one alone.
@pytest.mark.parametrize(
    "setting",
    ["plain", "lora with dropout"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("two workers", "epochs", "experts", "evaluation")],
)
def test_image_by_image_a_run_with_a_cold_cache_is_that_without_bit_for_bit(run, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(feature_fill, "BATCH_IMAGES", 1)
    assert_same(run("cold", setting, "--feature_cache", tmp_path / "store"), run("none", setting))


def test_on_a_cpu_a_cache_changes_nothing_of_a_run_with_one_image_a_micro_batch(run, tmp_path):
    alone = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4)
    store = (*alone, "--feature_cache", tmp_path / "store")
    none = run("none", "plain", *alone)
    assert_same(run("cold", "plain", *store), none)
    assert_same(run("warm", "plain", *store), none)


def test_features_in_a_larger_batch_of_the_tower_differ_by_rounding_alone(run, tmp_path):
    store = ("--feature_cache", tmp_path / "store", "--max_grad_norm", 0, "--optim", "sgd")
    cached, none = run("cold", "plain", *store), run("none", "plain", *store[2:])
    for name, weight in none[0].items():
        torch.testing.assert_close(cached[0][name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert [a == b for a, b in zip(cached[2], none[2], strict=True)] == [True] * 3


@pytest.mark.parametrize("setting", ["plain", "two workers", "lora with dropout"])
def test_a_run_resumes_exactly_with_a_cache_that_is_cold_again(run, tmp_path, setting):
    store = ("--feature_cache", tmp_path / "store")
    full = run("run", setting, *store)
    shutil.rmtree(tmp_path / "store")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert_same(full, run("again", setting, *store, "--resume_from_checkpoint", checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], ["--deepspeed", "zero2.json"]], ids=["ddp", "zero2"])
def test_two_ranks_that_fill_the_cache_train_what_they_do_with_a_full_one(stage_flags, toy_data, tmp_path, engine):
    launch = runpy.run_path(str(Path(__file__).parents[1] / "test_ranks.py"))["launch"]
    data, cases = toy_data(tmp_path / "mixed"), []
    more = ["--max_steps", 4, "--lora_dropout", 0.3, "--logging_steps", 1, "--report_to", "none"]
    for name, cache in (("cold", tmp_path / "store"), ("warm", tmp_path / "store")):
        flags = stage_flags("lora", tmp_path / name, *more, "--feature_cache", cache, data=data)
        cases.append({"name": name, "argv": [*flags, *engine]})
    found = launch(cases, tmp_path)
    assert len(found["cold"][0]["loss"]) == 4
    assert found["cold"] == found["warm"]


def flip_a_bit_of_each_feature_file(store):
    """Damage the first image's features in every file."""
    for path in store.rglob("*.bin"):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.unlink()
        path.write_bytes(content)


def test_damaged_features_are_made_again_before_the_first_step(run, tmp_path, caplog):
    store = tmp_path / "store"
    expected = run("first", "plain", "--feature_cache", store)
    flip_a_bit_of_each_feature_file(store)
    assert_same(expected, run("second", "plain", "--feature_cache", store))
    assert "features of 1 image(s) in" in caplog.text
    caplog.clear()
    assert_same(expected, run("third", "plain", "--feature_cache", store))
    assert "are damaged" not in caplog.text


@pytest.mark.parametrize(
    ("setting", "policy"), [("plain", "skip"), pytest.param("two workers", "raise", marks=pytest.mark.slow)]
)
def test_features_that_a_worker_finds_damaged_end_the_run_and_it_resumes_exactly(
    run, tmp_path, monkeypatch, setting, policy
):
    store = ("--feature_cache", tmp_path / "store", "--bad_record", policy, "--num_train_epochs", 3, "--max_steps", -1)
    expected = run("first", setting, *store)
    with monkeypatch.context() as patch:
        # As with a cache that is too large to be read before the first step.
        patch.setattr(feature_fill, "CHECKED_BYTES", 0)
        flip_a_bit_of_each_feature_file(tmp_path / "store")
        with pytest.raises(DataError, match=r"at step \d+: record \d+: its cached features in .* are damaged"):
            run("second", setting, *store)
    # No checkpoint of the step that would have trained without the record.
    assert not list((tmp_path / "second").glob("skipped_records.jsonl.part"))
    assert_same(expected, run("second", setting, *store))
