"""The private methods of transformers that training overrides or calls; a run that would miss one ends at its start.

An override that nobody calls any more is silent: the gradient check, the packs or the complete save would be lost. The
reason for each stands beside the override.
"""

import transformers
from transformers import PreTrainedModel, Trainer

# The version that the tests run with; the oldest that is supported has all of them too.
TESTED = "5.23.0"
# The methods by class; the tests compare their parameters.
OVERRIDDEN = {
    Trainer: (
        "_evaluate",
        "_get_train_sampler",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_maybe_log_save_evaluate",
        "_prepare_for_training",
        "_save_checkpoint",
    ),
    PreTrainedModel: ("_init_weights", "_set_gradient_checkpointing"),
}
CALLED = {
    Trainer: (
        "_get_output_dir",
        "_load_optimizer_and_scheduler",
        "_prepare_inputs",
        "_save_rng_state",
    ),
}


def check_trainer_parts(*tables: dict) -> None:
    """Raise ImportError that names the methods which the installed transformers lacks, its version, and what to do."""
    missing = [
        f"{owner.__name__}.{name}"
        for table in tables or (OVERRIDDEN, CALLED)
        for owner, methods in table.items()
        for name in methods
        if not hasattr(owner, name)
    ]
    if missing:
        raise ImportError(
            f"training uses {', '.join(missing)}, and transformers {transformers.__version__} has no such method; "
            f"install transformers=={TESTED}."
        )
