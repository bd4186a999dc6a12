"""Evaluate a model in training: exact loss over held-out records, and answers to a few of them."""

import torch

from llava_lite.constants import IGNORE_INDEX
from llava_lite.distributed.ranks import everyone
from llava_lite.train.deepspeed.experts import needs_all_ranks
from llava_lite.train.monitor.generations import begin_answers, generate_answers, report_answers, write_answers
from llava_lite.train.saving.interrupt import EvaluationStopped


def count_for_rank(num_records, rank, batch_size):
    """Return how many of the last `num_records` a rank has; each rank gets a batch, in order."""
    return max(0, num_records - rank * batch_size)


def readable_examples(eval_set, num_examples, facts):
    """Return the first examples of an evaluation set that every rank can read; all ranks must call it."""
    examples, problems, i = [], [], 0
    while len(examples) < num_examples and i < len(eval_set):
        example = eval_set[i]
        answers = everyone((example.get("left_out"), bool((example["labels"] != IGNORE_INDEX).any())))
        problems += [problem for problem, _ in answers if problem is not None]
        if all(is_readable for _, is_readable in answers):
            examples.append(example)
        i += 1
    if problems:
        facts.logs["eval"].leave_out(problems, facts.step)
    return examples


class EvaluationMixin:
    """Trainer overrides; a subclass sets eval_examples, eval_max_new_tokens, meter and progress (ProgressCallback)."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of a batch; the sums over supervised tokens are kept for evaluation_loop."""
        inputs = self._prepare_inputs({key: value for key, value in inputs.items() if key != "sample_ids"})
        self.hide_repeats(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, num_items_in_batch=1, logits_to_keep=1)
        num_supervised = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        balance = outputs.get("moe_loss")
        loss = outputs["lm_loss"].float()
        balance = torch.zeros_like(loss) if balance is None else balance.float()
        self.eval_sums += torch.stack([loss, num_supervised.to(loss), balance, torch.ones_like(loss)]).double()
        return loss / num_supervised.clamp(min=1), None, None

    def hide_repeats(self, inputs):
        """Ignore the records that pad the ranks' last batches: they were counted already."""
        progress = self.accelerator.gradient_state
        if progress.end_of_dataloader and progress.remainder > 0:
            rank = self.accelerator.process_index
            count = count_for_rank(progress.remainder, rank, self.args.eval_batch_size)
            ends = inputs.get("cu_seq_lens_q")
            if ends is None:
                inputs["labels"][count:] = IGNORE_INDEX
            else:
                inputs["labels"][:, ends[min(count, len(ends) - 1)] :] = IGNORE_INDEX
            inputs.pop("supervised_positions", None)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Run Trainer's loop; the loss is the mean over all supervised tokens, independent of the batches."""
        self.eval_sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, num_supervised, balance, num_batches = self.accelerator.reduce(self.eval_sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(num_supervised, 1)
        if self.unwrapped.moe_layers():
            output.metrics[f"{metric_key_prefix}_moe_loss"] = balance / max(num_batches, 1)
        return output

    def evaluate(self, *args, **kwargs):
        """Return the metrics of the evaluation set; answers go to generations.jsonl and the loggers."""
        with self.meter.pause():
            try:
                metrics = super().evaluate(*args, **kwargs)
                self.answer_examples()
            except EvaluationStopped:
                self.release_gathered()
                raise
            # After another error there may be no ranks to release them with, and a second one would hide it.
            self.release_gathered()
        return metrics

    def release_gathered(self):
        """Release the weights that ZeRO-3 prefetches for a layer that is not computed any more.

        After the last token of an answer some are still in flight, and a save could not gather them.
        """
        release = getattr(self.model_wrapped, "empty_partition_cache", None)
        if release is not None:
            release()

    def begin_answers(self, step, is_answered):
        """Drop the answers that this run gives again: after `step`, and at it unless the run has given them."""
        if self.is_world_process_zero():
            begin_answers(self.args.output_dir, step, is_answered)

    def answer_examples(self):
        """Generate answers to a few records: on rank 0, or on all ranks where a forward pass needs them.

        After each, all ranks agree whether a signal has come; what is given after one may be cut short.
        """
        model, answers = self.unwrapped, []
        answers_here = needs_all_ranks(model) or self.is_world_process_zero()
        for example in self.eval_examples:
            if answers_here:
                with self.accelerator.autocast():
                    answers += generate_answers(
                        *(model, self.processing_class, [example], self.args.device, self.eval_max_new_tokens),
                        is_stopped=lambda: self.progress.is_evaluating and self.progress.signals.number > 0,
                    )
            self.progress.stop_evaluation_if_signalled()
        if answers and self.is_world_process_zero():
            write_answers(self.args.output_dir, self.state.global_step, answers)
            report_answers(self.callback_handler.callbacks, self.state.global_step, answers)
