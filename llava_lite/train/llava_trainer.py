"""The Trainer of transformers with LLaVA's sampler, parameter groups, exact accumulation, guards and metrics."""

import logging
from contextlib import contextmanager
from functools import cached_property

import torch
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from llava_lite.data.sampler import split_to_even_chunks
from llava_lite.distributed.ranks import raise_together
from llava_lite.errors import DiskError, get_sentence
from llava_lite.model.adaption_prompt import gates_are_open
from llava_lite.model.moe.block import RoutingContext
from llava_lite.train.compat.arguments import completed
from llava_lite.train.compat.order import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
)
from llava_lite.train.compat.state import get_mm_adapter_state_maybe_zero_3, maybe_zero_3
from llava_lite.train.inputs.sampler import get_sampler
from llava_lite.train.inputs.shards import StreamMixin
from llava_lite.train.inputs.skipped import SkipMixin
from llava_lite.train.monitor.activity import ActivityMixin
from llava_lite.train.monitor.evaluation import EvaluationMixin
from llava_lite.train.monitor.experts import ExpertMeter, flat_report
from llava_lite.train.monitor.guards import GradientWatch
from llava_lite.train.monitor.plots import draw_plots
from llava_lite.train.monitor.run_log import RunLog, TrainingBar
from llava_lite.train.monitor.skipped_steps import FiniteMixin
from llava_lite.train.monitor.throughput import Meter, get_matmul, has_images, peak_flops, step_flops
from llava_lite.train.publish.push import PushingMixin
from llava_lite.train.saving.checkpoint import CheckpointMixin
from llava_lite.train.saving.schedule import FollowFlags
from llava_lite.train.trainer_parts import check_trainer_parts
from llava_lite.train.tuning import compute_dtype, parameter_groups

# LLaVA's names are imported from here too.
__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "maybe_zero_3",
    "split_to_even_chunks",
]

logger = logging.getLogger(__name__)


class RunEvents(TrainerCallback):
    """Start the run's log when training starts; draw the plots at every save and at the end."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the log, the clock and the gradient watch."""
        self.trainer.begin_run()

    def on_save(self, args, state, control, **kwargs):
        """Draw."""
        self.trainer.draw()

    def on_train_end(self, args, state, control, **kwargs):
        """Draw, and wait for a checkpoint that is being uploaded."""
        self.trainer.draw()
        self.trainer.finish_upload()


class LLaVATrainer(
    ActivityMixin, FiniteMixin, StreamMixin, SkipMixin, PushingMixin, CheckpointMixin, EvaluationMixin, Trainer
):
    """Trains a LLaVA model; args are llava_lite's TrainingArguments, batches come from its collator.

    eval_examples: examples of the evaluation set that are answered at each evaluation. tokenizer: LLaVA's word, from
    transformers 4, for processing_class. facts: see SkipMixin.
    """

    def __init__(self, model, args, *, eval_examples=(), eval_max_new_tokens=64, tokenizer=None, **kwargs):
        check_trainer_parts()
        args = completed(args)
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        if args.n_gpu > 1:
            logger.warning(
                "one process uses one device: %d of them stay idle. Start ranks with deepspeed.", args.n_gpu - 1
            )
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        self.eval_examples, self.eval_max_new_tokens = list(eval_examples), eval_max_new_tokens
        # The model divides its loss by num_items_in_batch and shifts labels, whatever wraps it.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.run_log = RunLog(args.output_dir, self.is_world_process_zero())
        self.log_error = None
        self.experts = ExpertMeter()
        self.balance_sum = torch.zeros((), device=args.device)
        self.last_metrics_step = 0
        self.sample_ids, self.ids_of_step, self.has_images, self.is_supervised = [], [], False, True
        self.watch = GradientWatch(())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar)
        self.add_callback(RunEvents(self))
        self.follow_flags = FollowFlags()
        self.add_callback(self.follow_flags)

    @cached_property
    def meter(self):
        """Tokens a second and MFU; made at first use, since a peak may have to be measured."""
        peak = peak_flops(self.args.device, compute_dtype(self.args), get_matmul(self.model))
        return Meter(step_flops(self.model), peak)

    @cached_property
    def groups(self):
        """The parameter groups of the optimizer."""
        return parameter_groups(self.model, self.args, self.get_decay_parameter_names(self.model))

    @property
    def unwrapped(self):
        """The LLaVA model inside engine and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def begin_run(self):
        """Start the log, the clock and the watch on the first gradients."""
        super().begin_run()
        step = self.state.global_step
        written = [line for line in self.state.log_history if line["step"] == step]
        with self.kept_log_error():
            self.run_log.start(step, len(written))
            self.begin_answers(step, is_answered=any("eval_runtime" in line for line in written))
        self.raise_log_error()
        self.last_metrics_step = min(self.last_metrics_step, self.state.global_step)
        self.watch = GradientWatch(self.groups)
        self.watched_step, self.checked_norm, self.gates_were_open = None, None, gates_are_open(self.unwrapped)
        self.meter.start_clock()

    def draw(self):
        """Draw the plots, on one rank."""
        if self.run_log.is_writer:
            with self.meter.pause():
                try:
                    draw_plots(self.args.output_dir)
                except OSError as error:
                    # Decoration; `llava-lite report` draws from the log at any time.
                    logger.warning("%s has no new plots: %s", self.args.output_dir, get_sentence(error))

    # Optimizer and sampler.

    def create_optimizer(self, model=None):
        """Return the optimizer over the parameter groups; one that makes groups of its own keeps them."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(
                self.args, self.model if model is None else model
            )
            if {"params", "model", "optimizer_dict"} & set(kwargs):
                return super().create_optimizer(model)
            self.optimizer = optimizer_class([group.for_optimizer() for group in self.groups], **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Return the learning-rate schedule, after noting its settings, which a checkpoint overwrites."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # DeepSpeed makes the optimizer of its JSON later than Trainer's.
        self.follow_flags.note(self.optimizer if optimizer is None else optimizer, scheduler)
        return scheduler

    # The public get_train_dataloader would have to make the loader again, with all of its settings.
    def _get_train_sampler(self, train_dataset=None):
        """Return the sampler of groups or packs, or the one by length and modality; else Trainer's own."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = get_sampler(dataset, self.args)
        return super()._get_train_sampler(dataset) if sampler is None else sampler

    def get_train_dataloader(self):
        """Return the loader of batches."""
        return self.with_own_seed(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the loader of an evaluation's batches."""
        return self.with_own_seed(super().get_eval_dataloader(eval_dataset))

    def with_own_seed(self, loader):
        """Return a loader whose workers, if they stay, take their seed from a random state of its own.

        They draw it once, when they start, and a resumed run starts them at other steps.
        """
        if self.args.dataloader_persistent_workers:
            # accelerate's loaders read through one that they hold.
            getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    # A step.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and count their tokens and images."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.meter.add(batch)
        self.ids_of_step, self.has_images = [], any(has_images(batch) for batch in batches)
        # Counted by our collator; batches of another one are taken to have some.
        self.is_supervised = any(len(batch.get("supervised_positions", "?")) for batch in batches)
        return batches, num_items

    def training_step(self, model, inputs, *args, **kwargs):
        """Train on a micro-batch and return its loss; the ids of its records are kept for messages."""
        inputs = dict(inputs)
        self.sample_ids = list(inputs.pop("sample_ids", ()))
        self.note_part("forward of", self.sample_ids)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a micro-batch, scaled so that the step's gradient is that of one large batch.

        Cross-entropy: summed over supervised tokens, divided by those of the full step on all ranks. Balance loss: the
        mean over micro-batches and ranks. Engines average over ranks, hence the factor on the first.
        """
        routing = RoutingContext()
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, routing=routing)
        num_ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = outputs["lm_loss"] * num_ranks
        if outputs.get("moe_loss") is not None:
            balance = outputs["moe_loss"] / self.current_gradient_accumulation_steps
            loss = loss + balance
            self.balance_sum += balance.detach()
            self.experts.add(routing)
        self.note_part("loss of", self.sample_ids)
        loss = self.checked_loss(loss)
        self.note_part("backward of", self.sample_ids)
        self.ids_of_step += self.sample_ids
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        """Return 0: the meter counts the batch, and the log adds its flops, without waiting for the device."""
        return 0

    # No callback gets the gradient norm, and none comes before the log of a step.
    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs):
        """Check the step before anything of it is written."""
        # At the end of an epoch this runs twice for a step.
        is_new, self.watched_step = self.watched_step != self.state.global_step, self.state.global_step
        num_skipped = self.num_skipped
        self.checked_norm = self.check_step(grad_norm) if is_new else self.checked_norm
        if self.watch.handles and is_new and num_skipped == self.num_skipped:
            self.watch.check(self.has_images, exempt=self.groups_without_gradient(), is_supervised=self.is_supervised)
            self.gates_were_open = gates_are_open(self.unwrapped)
        super()._maybe_log_save_evaluate(tr_loss, self.checked_norm, model, *args, **kwargs)

    def groups_without_gradient(self):
        """Return the groups that may get no gradient: rows of new tokens that no record holds, and some routers.

        While the experts of a layer are equal, its router has a gradient from the balance loss only.
        """
        blocks = self.unwrapped.moe_layers().values()
        router = ("router",) if all(block.moe.router_aux_loss_coef == 0 for block in blocks) else ()
        # Behind gates that were still closed in this step nothing has a gradient but the gates.
        behind = () if self.gates_were_open else ("mm_projector", "vision_tower")
        return ("new_words", *router, *behind)

    def stopped_clock(self):
        """Return a context whose time does not count as training, for a save."""
        return self.meter.pause()

    # The log.

    def copy_sums(self):
        """Return a copy of the sums of the losses and of the experts."""
        return super().copy_sums() | {"balance": self.balance_sum.clone(), "experts": dict(self.experts.sums)}

    def restore_sums(self, sums):
        """Take them back. Tokens and records stay: the step was computed."""
        super().restore_sums(sums)
        self.balance_sum, self.experts.sums = sums["balance"], sums["experts"]

    @contextmanager
    def kept_log_error(self):
        """Keep an OSError of this rank until all ranks raise it, at the end of a step."""
        try:
            yield
        except OSError as error:
            self.log_error = self.log_error or error

    @property
    def has_news(self):
        """Whether this rank must tell the others of a record, or of a log that could not be written."""
        return super().has_news or self.log_error is not None

    def agree_on_left_out(self, name="train"):
        """Leave out on every rank what any rank could not read; end all of them if one could not write its log."""
        super().agree_on_left_out(name)
        self.raise_log_error()

    # No callback comes between the log of a step and its save.
    def _save_checkpoint(self, model, trial):
        """Save; DiskError where the log has lost a line, which a run resumed from here would not write again."""
        self.raise_log_error()
        super()._save_checkpoint(model, trial)

    def raise_log_error(self):
        """Raise DiskError on every rank if one could not write its log; all must call it."""
        raise_together(self.log_error, DiskError, f"The run stopped at step {self.state.global_step}.")

    def log(self, logs, start_time=None):
        """Write a line of the log; of training also balance loss, tokens a second, MFU and expert load.

        If the disk refuses it, the run ends with the next step, on all ranks.
        """
        reports = {}
        if "loss" in logs:
            logs.update(self.get_metrics(logs))
            reports = self.experts.read(lambda row: self.accelerator.reduce(row, "sum"))
        elif "train_loss" in logs:
            num_steps = self.state.global_step - self.progress.first_step
            self.mean_over_taken(logs, "train_loss", num_steps, self.num_skipped)
        with self.kept_log_error():
            super().log(logs, start_time)
            line = {"step": self.state.global_step, **logs}
            if reports:
                self.report(flat_report(reports))
                line["experts"] = {str(layer): report for layer, report in reports.items()}
            self.run_log.write(line)

    def report(self, numbers):
        """Send numbers to TensorBoard, W&B and the like only: too many for a terminal and the trainer's state."""
        reporters = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(self.args, self.state, self.control, model=self.model, logs=numbers)

    def get_metrics(self, logs):
        """Return what is logged beside the loss of `logs`, mean over ranks; all ranks must call it.

        Steps that were left out count in no loss: the one of `logs` is made the mean of the others, or dropped where
        there are none.
        """
        num_steps, num_skipped = self.state.global_step - self.last_metrics_step, self.num_skipped_since_log
        self.last_metrics_step, self.num_skipped_since_log = self.state.global_step, 0
        num_taken = self.mean_over_taken(logs, "loss", num_steps, num_skipped)
        work = self.meter.read()
        self.current_flos += work.flops
        mine = [work.tokens_per_s, work.mfu, self.balance_sum.item()]
        tokens_per_s, mfu, balance = self.accelerator.reduce(
            torch.tensor(mine, device=self.args.device), "mean"
        ).tolist()
        counts = torch.tensor([work.tokens, work.padded_tokens, work.records], device=self.args.device)
        tokens, padded_tokens, records = self.accelerator.reduce(counts, "sum").tolist()
        self.balance_sum.zero_()
        metrics = {"tokens_per_s": tokens_per_s, "mfu": mfu}
        metrics |= {"tokens": tokens, "padded_tokens": padded_tokens, "records": records}
        if num_skipped:
            metrics["skipped_steps"] = num_skipped
        if self.unwrapped.moe_layers() and num_taken:
            metrics["moe_loss"] = balance / num_taken
            metrics["lm_loss"] = logs["loss"] - metrics["moe_loss"]
        return metrics

    def progress_state(self):
        """Return what was counted since the last line of the log, for a checkpoint."""
        return super().progress_state() | {
            "balance_sum": self.balance_sum.cpu(),
            "last_figures_step": self.last_metrics_step,
            "experts": {str(layer): row.cpu() for layer, row in self.experts.sums.items()},
            "meter": self.meter.state(),
        }

    def load_progress_state(self, state):
        """Restore the counts of the run that saved them."""
        super().load_progress_state(state)
        device = self.args.device
        self.balance_sum = state["balance_sum"].to(device)
        self.last_metrics_step = state["last_figures_step"]
        self.experts.sums = {int(layer): row.to(device) for layer, row in state["experts"].items()}
        self.meter.load_state(state["meter"], device)
