"""The private methods of transformers that training overrides or calls are there, and missed at its start if not."""

import inspect

import pytest
import torch
import transformers
from transformers import PreTrainedModel, Trainer

from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.saving import interrupt
from llava_lite.train.trainer_parts import CALLED, OVERRIDDEN, TESTED, check_trainer_parts

# The parameters of each; _set_gradient_checkpointing has a further one in later versions.
PARAMETERS = {
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_maybe_log_save_evaluate": [
        *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
        "learning_rate",
    ],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_init_weights": ["self", "module"],
    "_set_gradient_checkpointing": ["self", "enable", "gradient_checkpointing_func"],
    "_get_output_dir": ["self", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_prepare_inputs": ["self", "inputs"],
    "_save_rng_state": ["self", "output_dir"],
}
METHODS = [
    (owner, name, PARAMETERS[name])
    for table in (OVERRIDDEN, CALLED)
    for owner, methods in table.items()
    for name in methods
]


# More than these are not wanted: callbacks and public methods come first.
def test_no_other_private_method_is_overridden():
    ours = {name for cls in LLaVATrainer.__mro__ if cls.__module__.startswith("llava_lite.") for name in vars(cls)}
    theirs = {name for name, value in vars(Trainer).items() if callable(value)}
    private = {name for name in ours & theirs if name.startswith("_") and not name.startswith("__")}
    assert private == set(OVERRIDDEN[Trainer])


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS, ids=lambda value: getattr(value, "__name__", None))
def test_the_installed_transformers_has_the_method(owner, name, parameters):
    method = getattr(owner, name, None)
    assert method is not None, f"transformers {transformers.__version__} has no {owner.__name__}.{name}"
    found = list(inspect.signature(method).parameters)
    # Those of PreTrainedModel have more in later versions, which are passed on.
    found = found[: len(parameters)] if owner is PreTrainedModel else found
    assert found == parameters, f"transformers {transformers.__version__}: {owner.__name__}.{name}{tuple(found)}"


def test_a_missing_method_ends_a_run_at_its_start_with_its_name_and_what_to_install():
    with pytest.raises(ImportError) as error:
        check_trainer_parts({Trainer: ("_no_such_method", "_save_checkpoint")})
    assert str(error.value) == (
        f"training uses Trainer._no_such_method, and transformers {transformers.__version__} has no such method; "
        f"install transformers=={TESTED}."
    )


def test_a_trainer_looks_for_the_methods_when_it_is_made(monkeypatch):
    monkeypatch.delattr(Trainer, "_maybe_log_save_evaluate")
    with pytest.raises(ImportError, match=r"training uses Trainer\._maybe_log_save_evaluate, and transformers"):
        LLaVATrainer(None, None)


def test_the_installed_trainer_counts_under_the_names_that_a_checkpoint_restores(run_stage, tmp_path):
    trainer = run_stage("projector", tmp_path / "out", "--max_steps", 2, "--logging_steps", 2)
    expected = {
        interrupt.LOSS: torch.zeros(()),
        interrupt.LOSS_LOGGED: pytest.approx(2 * trainer.state.log_history[0]["loss"]),
        interrupt.LAST_LOGGED_STEP: 2,
    }
    # transformers 5.17 divides the mean loss of a run by all its steps and has no such name.
    if interrupt.FIRST_STEP in inspect.getsource(Trainer):
        expected[interrupt.FIRST_STEP] = 0
    for name, value in expected.items():
        assert hasattr(trainer, name), f"transformers {transformers.__version__} has no Trainer.{name}"
        assert getattr(trainer, name) == value, name
    # Set by LLaVATrainer, whose model shifts labels itself.
    assert "_loss_shifts_labels" in inspect.getsource(Trainer)
