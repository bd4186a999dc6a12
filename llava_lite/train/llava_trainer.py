"""The Trainer of transformers with LLaVA's sampler, groups, exact accumulation, guards and figures."""

import logging
from functools import cached_property

import torch
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from llava_lite.model.moe import RoutingContext
from llava_lite.train.checkpoint import CheckpointMixin
from llava_lite.train.evaluation import EvaluationMixin
from llava_lite.train.expert_meter import ExpertMeter, flat_report
from llava_lite.train.guards import GradientWatch, stop_if_gradient_not_finite, stop_if_not_finite
from llava_lite.train.heap import keep_freed_memory
from llava_lite.train.llava_args import completed
from llava_lite.train.llava_order import (
    LengthGroupedSampler,
    examples_of,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava_lite.train.llava_state import get_mm_adapter_state_maybe_zero_3, maybe_zero_3
from llava_lite.train.plots import draw_plots
from llava_lite.train.pushing import PushingMixin
from llava_lite.train.run_log import RunLog, TrainingBar
from llava_lite.train.schedule import FollowFlags
from llava_lite.train.skipped import SkipMixin
from llava_lite.train.stream_run import StreamMixin
from llava_lite.train.throughput import Meter, has_pictures, peak_flops, step_flops
from llava_lite.train.tuning import compute_dtype, parameter_groups

# With LLaVA's names, whose homes are files of their own.
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
    """Begin the run's log where training begins; draw the plots when there is something to keep."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin the log, the clock and the watch."""
        self.trainer.begin_run()

    def on_save(self, args, state, control, **kwargs):
        """Draw."""
        self.trainer.draw()

    def on_train_end(self, args, state, control, **kwargs):
        """Draw."""
        self.trainer.draw()


class LLaVATrainer(StreamMixin, SkipMixin, CheckpointMixin, EvaluationMixin, PushingMixin, Trainer):
    """Trains a LLaVA model; args are llava_lite's TrainingArguments, batches come from its collator.

    eval_examples: examples of the evaluation set that are answered at each evaluation. tokenizer: LLaVA's word, from
    transformers 4, for processing_class. facts: see SkipMixin.
    """

    def __init__(self, model, args, *, eval_examples=(), eval_max_new_tokens=64, tokenizer=None, **kwargs):
        args = completed(args)
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        if args.n_gpu > 1:
            logger.warning(
                "one process drives one device: %d of them stay idle. Start ranks with deepspeed.", args.n_gpu - 1
            )
            args._n_gpu = 1
        if args.device.type == "cpu":
            keep_freed_memory()
        super().__init__(model, args, **kwargs)
        self.eval_examples, self.eval_max_new_tokens = list(eval_examples), eval_max_new_tokens
        # The model divides its loss by num_items_in_batch and shifts labels, whatever wraps it.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.run_log = RunLog(args.output_dir, self.is_world_process_zero())
        self.experts = ExpertMeter()
        self.balance_sum = torch.zeros((), device=args.device)
        self.last_figures_step = 0
        self.sample_ids, self.ids_of_step, self.has_pictures, self.learns = [], [], False, True
        self.watch = GradientWatch(())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar)
        self.add_callback(RunEvents(self))
        self.follow_flags = FollowFlags()
        self.add_callback(self.follow_flags)

    @cached_property
    def meter(self):
        """Tokens a second and MFU; made late, since a peak may have to be measured."""
        return Meter(step_flops(self.model), peak_flops(self.args.device, compute_dtype(self.args)))

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
        """Begin the log, the clock and the watch on the first gradients."""
        super().begin_run()
        self.run_log.start(self.state.global_step)
        self.last_figures_step = min(self.last_figures_step, self.state.global_step)
        self.watch = GradientWatch(self.groups)
        self.meter.start_clock()

    def draw(self):
        """Draw the plots, on one rank."""
        if self.run_log.is_writer:
            with self.meter.pause():
                draw_plots(self.args.output_dir)

    # What trains, and on what.

    def create_optimizer(self, model=None):
        """Return the optimizer over the named groups; an optimizer that makes its own groups keeps them."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(
                self.args, self.model if model is None else model
            )
            if {"params", "model", "optimizer_dict"} & set(kwargs):
                return super().create_optimizer(model)
            self.optimizer = optimizer_class([group.for_optimizer() for group in self.groups], **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Return the schedule of the rate; what the flags say is remembered before a checkpoint is read over it."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.follow_flags.note(self.optimizer, scheduler)
        return scheduler

    def _get_train_sampler(self, train_dataset=None):
        """Return the sampler of packs, or the one that keeps lengths and modalities together; else the stock one."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.packing == "tokens":
            from llava_lite.data.packing import PackSampler, refuse_longer

            refuse_longer(dataset, self.args.packing_tokens)
            return PackSampler(dataset.lengths, self.args.packing_tokens, seed)
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        from llava_lite.data.sampler import ModalityLengthGroupedSampler

        lengths, has_picture = examples_of(dataset)
        return ModalityLengthGroupedSampler(
            lengths,
            has_picture,
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=seed,
        )

    # A step.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, having counted what they hold."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.meter.add(batch)
        self.ids_of_step, self.has_pictures = [], any(has_pictures(batch) for batch in batches)
        # As the collator has counted them; another one's batches all have some.
        self.learns = any(len(batch.get("supervised_positions", "?")) for batch in batches)
        return batches, num_items

    def _prepare_inputs(self, inputs):
        """Move a batch to the device; the ids of its records stay here, for messages."""
        inputs = dict(inputs)
        self.sample_ids = list(inputs.pop("sample_ids", ()))
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a micro-batch, scaled so that the step's gradient is that of one large batch.

        Cross-entropy: summed over learned tokens, divided by those of the whole step on all ranks. Balance loss: mean
        over micro-batches and ranks. Engines average over ranks, hence the factor on the first.
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
        stop_if_not_finite(loss.detach(), self.sample_ids, self.state.global_step + 1)
        self.ids_of_step += self.sample_ids
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        """Return 0: the meter counts a batch, and adds it when the log reads it, without waiting for a device."""
        return 0

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs):
        """Look at the step before anything of it is written."""
        # fp16's loss scaling meets infinite gradients on purpose and skips the step.
        if not self.args.fp16:
            stop_if_gradient_not_finite(grad_norm, self.ids_of_step, self.state.global_step)
        self.watch.check(self.has_pictures, exempt=self.groups_without_gradient(), learns=self.learns)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    def groups_without_gradient(self):
        """Return the groups that may get none: rows of words that no record of the step holds, and some routers.

        Equal experts tell a router nothing, only the balance loss does.
        """
        blocks = self.unwrapped.moe_layers().values()
        router = ("router",) if all(block.moe.router_aux_loss_coef == 0 for block in blocks) else ()
        return ("new_words", *router)

    def _save_checkpoint(self, *args, **kwargs):
        """Save, with the clock of the meter stopped."""
        with self.meter.pause():
            super()._save_checkpoint(*args, **kwargs)

    # The log.

    def log(self, logs, start_time=None):
        """Write a line of the log; a line of training gets balance loss, tokens a second, MFU and, apart, experts."""
        reports = {}
        if "loss" in logs:
            logs.update(self.figures(logs["loss"]))
            reports = self.experts.read(lambda row: self.accelerator.reduce(row, "sum"))
        super().log(logs, start_time)
        line = {"step": self.state.global_step, **logs}
        if reports:
            self.report(flat_report(reports))
            line["experts"] = {str(layer): report for layer, report in reports.items()}
        self.run_log.write(line)

    def report(self, numbers):
        """Send numbers to TensorBoard, W&B and the like alone: too many for a terminal and the trainer's state."""
        reporters = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(self.args, self.state, self.control, model=self.model, logs=numbers)

    def figures(self, loss):
        """Return what is logged beside the loss, mean over ranks; all of them must call this."""
        num_steps = self.state.global_step - self.last_figures_step
        self.last_figures_step = self.state.global_step
        work = self.meter.read()
        self.current_flos += work.flops
        mine = [work.tokens_per_s, work.mfu, self.balance_sum.item()]
        tokens_per_s, mfu, balance = self.accelerator.reduce(
            torch.tensor(mine, device=self.args.device), "mean"
        ).tolist()
        self.balance_sum.zero_()
        figures = {"tokens_per_s": tokens_per_s, "mfu": mfu}
        if self.unwrapped.moe_layers():
            figures["moe_loss"] = balance / num_steps
            figures["lm_loss"] = loss - figures["moe_loss"]
        return figures

    def progress_state(self):
        """Return what was counted since the last line of the log."""
        return super().progress_state() | {
            "balance_sum": self.balance_sum.cpu(),
            "last_figures_step": self.last_figures_step,
            "experts": {str(layer): row.cpu() for layer, row in self.experts.sums.items()},
            "meter": self.meter.state(),
        }

    def load_progress_state(self, state):
        """Take up the counts of the run that saved them."""
        super().load_progress_state(state)
        device = self.args.device
        self.balance_sum = state["balance_sum"].to(device)
        self.last_figures_step = state["last_figures_step"]
        self.experts.sums = {int(layer): row.to(device) for layer, row in state["experts"].items()}
        self.meter.load_state(state["meter"], device)
