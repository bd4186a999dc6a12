"""Note each part of a run for the watch on ranks and workers that hang."""

from transformers import TrainerCallback

from llava_lite.data.reading import ReadingNotes, dead_workers_named
from llava_lite.distributed.activity import LOADER, LONG, STEP, NotedBatches, note
from llava_lite.distributed.groups import set_group_timeouts


class NoteSteps(TrainerCallback):
    """Notes the parts of a step that only callbacks see."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Note that the weights are updated."""
        self.trainer.note_part("update")

    def on_step_end(self, args, state, control, **kwargs):
        """Note that the step is over; what comes next, log or save or evaluation, may take long."""
        self.trainer.num_steps_here += 1
        note(f"end of step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        """Note it."""
        note("end of the training")


class ActivityMixin:
    """Trainer overrides; the data sets are given notes of what their workers read."""

    # The first step of a process compiles and connects.
    num_steps_here, num_eval_batches = 0, 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(NoteSteps(self))
        for dataset in (self.train_dataset, self.eval_dataset):
            if hasattr(dataset, "reading"):
                dataset.reading = ReadingNotes(self.args.dataloader_num_workers)

    def note_part(self, part: str, sample_ids=()) -> None:
        """Note a part of a training step."""
        ids = f" records {list(sample_ids)}" if sample_ids else ""
        note(f"step {self.state.global_step + 1}: {part}{ids}", self.step_kind)

    @property
    def step_kind(self) -> str:
        """How long a part of a step may be silent."""
        return STEP if self.num_steps_here else LONG

    @property
    def readers(self):
        """What the workers of training and evaluation read."""
        return [getattr(dataset, "reading", None) for dataset in (self.train_dataset, self.eval_dataset)]

    def training_step(self, *args, **kwargs):
        """Train on a micro-batch; torch may report a worker that died at any moment."""
        with dead_workers_named(*self.readers):
            return super().training_step(*args, **kwargs)

    # The groups of an engine are made when it is.
    def _prepare_for_training(self, *args, **kwargs):
        """Wrap the model, then give its process groups --ddp_timeout."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        set_group_timeouts(self.args.ddp_timeout, self.model, self.model_wrapped, self.optimizer)
        return prepared

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step; waiting for each is noted."""
        readers = getattr(self.train_dataset, "reading", None)
        noted = NotedBatches(
            epoch_iterator, f"step {self.state.global_step + 1}", readers=readers, then=self.step_kind
        )
        with dead_workers_named(*self.readers):
            return super().get_batch_samples(noted, num_batches, device)

    def note_eval(self, what: str, kind: str = LONG) -> None:
        """Note a part of an evaluation."""
        readers = self.readers[1]
        note(f"evaluation at step {self.state.global_step}: {what}", kind, readers=readers)

    def prediction_step(self, *args, **kwargs):
        """Evaluate a batch; then the loop waits for the next."""
        self.num_eval_batches += 1
        # The first batches compile and connect, too.
        self.note_eval(f"batch {self.num_eval_batches}", STEP if self.num_eval_batches > 1 else LONG)
        result = super().prediction_step(*args, **kwargs)
        self.note_eval(f"waiting for batch {self.num_eval_batches + 1} of the loader", LOADER)
        return result

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate, with notes."""
        self.num_eval_batches = 0
        self.note_eval("waiting for the first batch of the loader", LOADER)
        with dead_workers_named(*self.readers):
            output = super().evaluation_loop(*args, **kwargs)
        self.note_eval("has all batches")
        return output
