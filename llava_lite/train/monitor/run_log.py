"""Write the metrics of a run: metrics.jsonl beside the checkpoints, and a progress bar with the last ones."""

import json
from pathlib import Path

from transformers.trainer_callback import ProgressCallback

from llava_lite.errors import named_disk_errors
from llava_lite.train.monitor.log_lines import METRICS, json_safe, read_metrics

ADVICE = "Every checkpoint is as it was: make room, or mend what is said here, and start again to continue."


class RunLog:
    """The lines of metrics.jsonl, one a log: step, loss, its parts, rates, tokens a second, MFU, experts.

    name: of another file of lines that each have a "step". DiskError where it cannot be written.
    """

    def __init__(self, output_dir, is_writer=True, name=METRICS):
        self.path = Path(output_dir) / name
        self.is_writer = is_writer

    def start(self, step, num_of_step=None):
        """Start after `step`: a resumed run drops the lines that it is about to write again.

        num_of_step: how many lines of that step it has written when it was saved; None for all.
        """
        if not self.is_writer:
            return
        lines = read_metrics(self.path) if step else []
        kept = [line for line in lines if line["step"] < step]
        kept += [line for line in lines if line["step"] == step][:num_of_step]
        beside, text = self.path.with_suffix(".tmp"), "".join(json.dumps(line) + "\n" for line in kept)
        with named_disk_errors(self.path, ADVICE, len(text)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_text(text, encoding="utf-8")
                beside.replace(self.path)
            finally:
                beside.unlink(missing_ok=True)

    def write(self, line):
        """Append one line; JSON has no NaN, so what is not finite becomes text."""
        if self.is_writer:
            text = json.dumps(json_safe(line), allow_nan=False) + "\n"
            with named_disk_errors(self.path, ADVICE, len(text)), open(self.path, "a", encoding="utf-8") as file:
                file.write(text)


class TrainingBar(ProgressCallback):
    """Trainer's bar with loss, tokens a second and MFU after it, in place of a table of all steps above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the last metrics after the bar; lines of an evaluation stay above it."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = bar_text(logs)
        if shown:
            self.training_bar.set_postfix_str(shown, refresh=False)
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")


def bar_text(logs):
    """Return loss, tokens a second of one device and MFU of a log line, "" where it has no loss."""
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4f}"]
    if "moe_loss" in logs:
        parts.append(f"balance {logs['moe_loss']:.4f}")
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s']:,.0f} tok/s/device")
    if "mfu" in logs:
        parts.append(f"MFU {100 * logs['mfu']:.1f}%")
    return ", ".join(parts)
