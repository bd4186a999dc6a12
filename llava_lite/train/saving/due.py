"""Keep what a run had still to do after a step when its checkpoint was saved, and do it when the run resumes.

After an optimizer step a run logs, evaluates and saves, as its flags say; then, after the last step of an epoch, once
more what is due at the end of an epoch. A checkpoint is saved in between: before an evaluation if a signal came, and
before the end of the epoch. A resumed run that went on with the next step would leave out all that came after.
"""

import tempfile
from contextlib import contextmanager

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

STEP, EPOCH = "step", "epoch"


class DueWork:
    """What is still to do after a step.

    place: after the step itself, or at the end of its epoch. evaluate, save: whether these are due. saved: the state
    of the checkpoint that is resumed, until its work is done; path: its directory. random_state: a directory with the
    random state after that work, with which the next step begins.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.saved, self.path, self.random_state, self.is_repeating = None, None, None, False
        self.begin(num_steps=1)

    def begin(self, num_steps: int) -> None:
        """Start a run with this many steps an epoch."""
        self.num_steps, self.place, self.evaluate, self.save = num_steps, STEP, False, False
        self.grad_norm = self.learning_rate = None

    def begin_step_end(self) -> None:
        """Note that a step has been taken."""
        self.place, self.random_state = STEP, None

    def begin_epoch_end(self) -> bool:
        """Note that the end of an epoch is reached; return whether it is for the first time in this process."""
        self.place = EPOCH
        return not self.is_repeating

    def note(self, control, grad_norm, learning_rate) -> None:
        """Note what is due now, and the figures of the step that a line of the log has."""
        self.evaluate, self.save = control.should_evaluate, control.should_save
        self.grad_norm, self.learning_rate = grad_norm, learning_rate

    def state(self) -> dict:
        """Return what a checkpoint keeps; it is being saved, so without an evaluation no save is due any more."""
        trainer = self.trainer
        is_last = trainer.state.global_step >= trainer.state.max_steps
        return {
            "place": self.place,
            "evaluate": self.evaluate,
            "save": self.evaluate and self.save,
            "grad_norm": None if self.grad_norm is None else float(self.grad_norm),
            "learning_rate": None if self.learning_rate is None else float(self.learning_rate),
            # A callback ended the run, such as the one for early stopping; a prolonged run goes on.
            "is_stopped": trainer.control.should_training_stop and not is_last,
            "max_steps": trainer.state.max_steps,
        }

    def is_epoch_over(self) -> bool:
        """Whether the end of the epoch was to follow the checkpoint that is resumed."""
        step = self.trainer.state.global_step
        ends = step % self.num_steps == 0 or step >= self.trainer.state.max_steps or self.is_stopped()
        return self.saved["place"] == STEP and step > 0 and ends

    def is_stopped(self) -> bool:
        """Whether a callback had ended the run that is resumed, with as many steps to come as now."""
        return self.saved["is_stopped"] and self.saved["max_steps"] == self.trainer.state.max_steps

    def keep_random_state(self) -> None:
        """Keep the random state of this rank for the next step."""
        self.random_state = tempfile.TemporaryDirectory()
        # Trainer's own: it knows the random states of every kind of device.
        self.trainer._save_rng_state(self.random_state.name)


class DoDueWork(TrainerCallback):
    """Does the work that is due before the first step, when every other callback has begun the run."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Do it."""
        self.trainer.do_due_work()


@contextmanager
def undone_on(kind: type[Exception], trainer):
    """Set the random state, the log and the callbacks back to where they were if `kind` is raised inside."""
    num_lines = len(trainer.state.log_history)
    callbacks = (*trainer.callback_handler.callbacks, trainer.control)
    states = [(one, one.state()) for one in callbacks if isinstance(one, ExportableState)]
    with tempfile.TemporaryDirectory() as directory:
        trainer._save_rng_state(directory)
        try:
            yield
        except kind:
            trainer._load_rng_state(directory)
            del trainer.state.log_history[num_lines:]
            for one, state in states:
                set_attributes(one, state["args"] | state["attributes"])
            raise


def set_attributes(target, values: dict) -> None:
    """Set attributes by name."""
    for name, value in values.items():
        setattr(target, name, value)


def restore_callbacks(trainer) -> None:
    """Give the callbacks of a resumed run what they had counted, such as for early stopping; settings stay as given.

    transformers does so on --restore_callback_states_from_checkpoint only, and then takes the old settings too.
    """
    kept = {
        name: states if isinstance(states, list) else [states]
        for name, states in trainer.state.stateful_callbacks.items()
    }
    for callback in trainer.callback_handler.callbacks:
        states = kept.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and states:
            set_attributes(callback, states.pop(0).get("attributes", {}))
