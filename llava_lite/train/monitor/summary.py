"""Summarise a run at its end, and report one that is started again although it has finished."""

import json
import logging
import math
import resource
import shlex
import shutil
import sys
from pathlib import Path

import torch

from llava_lite.distributed.ranks import everyone
from llava_lite.train.monitor.log_lines import is_number
from llava_lite.train.monitor.losses import get_ends, get_losses, loss_text
from llava_lite.train.monitor.report.files import STATE
from llava_lite.train.monitor.report.words import count, time_line
from llava_lite.train.publish.push import push_command
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.final_files import find_damage
from llava_lite.train.saving.other_ranks import DIVISION, RANKS, global_batch
from llava_lite.train.saving.trained_weights import PROJECTOR

logger = logging.getLogger(__name__)

# Flags of the length of a run; they are compared with the steps that it has taken.
LENGTHS = ("num_train_epochs", "max_steps")
GIB = 2**30


def chat_command(directory) -> str:
    """Return the command that chats with a model, for the directory in which the run was started."""
    program = "llava-lite" if shutil.which("llava-lite") else f"{shlex.quote(sys.executable)} -m llava_lite.cli"
    return f"{program} chat {shlex.quote(str(directory))}"


def peak_memory_gib(device) -> float:
    """Return the peak memory of any rank so far: of its GPU, or of its process on a CPU; all ranks must call it."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
    else:
        # Kilobytes on Linux, bytes on macOS.
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(everyone(peak_bytes)) / GIB


def summary(trainer, result, full: bool, memory_gib: float, report: Path | None = None) -> str:
    """Return the lines that end a run.

    result: what `trainer.train` returned. full: the directory holds every weight. memory_gib: see peak_memory_gib.
    report: the page of the run, if it was written.
    """
    args, log, directory = trainer.args, trainer.state.log_history, Path(trainer.args.output_dir)
    sees = trainer.unwrapped.config.has_vision_tower
    plots = [path.name for path in sorted(directory.glob("*.png"))]
    rows = {
        "model": f"{directory} ({'all weights' if full else 'trained weights; their base is opened with them'})",
        "loss": loss_line(log, result.training_loss),
        "evaluation": evaluation_line(log),
        "time": time_line(result.metrics.get("train_runtime", 0)),
        "memory": f"{memory_gib:.1f} GiB at most {'of a GPU' if args.device.type == 'cuda' else 'in a process'}",
        "left out": left_out_line(getattr(trainer, "facts", None), directory),
        "skipped": skipped_line(getattr(trainer, "num_skipped", 0)),
        "plots": ", ".join(str(directory / name) for name in plots),
        "report": str(report or ""),
        "chat": chat_command(directory) + (" (/image FILE shows it an image)" if sees else ""),
        "stage 2": f"--pretrain_mm_mlp_adapter {directory / PROJECTOR}" if args.tuning == "projector" else "",
    }
    steps, epochs = trainer.state.global_step, trainer.state.epoch or 0
    head = f"finished: {count(steps, 'step')}, {count(round(epochs, 2), 'epoch')}"
    return "\n".join([head, *(f"  {name:<12}{text}" for name, text in rows.items() if text)])


def loss_line(log, mean) -> str:
    """Return the loss at the start and at the end, each the mean of a tenth of the log; without a log the mean.

    mean: NaN of a run that has left out every step.
    """
    ends = get_ends(get_losses(log))
    if ends is None and math.isnan(mean):
        return "none: no step was taken"
    if ends is None:
        return f"{mean:.4f} on average; no step was logged (--logging_steps)"
    of_several = f" (means of the last and first {ends.num:,} logs)" if ends.num > 1 else ""
    return f"{loss_text(ends.last)} at the end, {loss_text(ends.first)} at the start{of_several}"


def left_out_line(facts, directory) -> str:
    """Return how many records were left out and which files list them; "" if none was."""
    counts = {name: len(log.start) + len(log.later) for name, log in getattr(facts, "logs", {}).items()}
    names = {"train": "to train on", "eval": "to evaluate on"}
    found = [f"{count(counts[name], 'record')} {names[name]}" for name in names if counts.get(name)]
    return f"{', '.join(found)} ({directory}/skipped_*.jsonl has the reasons)" if found else ""


def skipped_line(num_skipped: int) -> str:
    """Return how many steps were left out; "" if none was."""
    whose = "with a loss or a gradient that was not finite (--max_skipped_steps)"
    return f"{count(num_skipped, 'step')} {whose}; no loss of them is in a mean" if num_skipped else ""


def evaluation_line(log) -> str:
    """Return the last evaluation loss, and the best where that was another; "" without any."""
    found = [(line["eval_loss"], line["step"]) for line in log if is_number(line.get("eval_loss"))]
    if not found:
        return ""
    best = min(found)
    better = f", best {loss_text(best[0])} at step {best[1]:,}" if best[0] < found[-1][0] else ""
    return f"loss {loss_text(found[-1][0])}{better}"


def finished_before(args) -> str | None:
    """Return the message for an output directory that holds a complete run; None where there is something to do.

    All ranks must call it; those that write read the directory. A run is complete if its model and the state of its
    last step are there, and the flags ask for no further steps and, by its last checkpoint, for no other ones. Where
    only the model is damaged, the last checkpoint makes it again without a step; ValueError if there is none.
    """
    wanted = str(args.resume_from_checkpoint).lower()
    looks = args.should_save and wanted in ("none", "true")
    found = everyone((looks, look_for_complete(args) if looks else (None, None, None)))
    answers = [answer for looked, answer in found if looked]
    if not answers or not all(state for state, _, _ in answers):
        return None
    damages = [(damage, advice) for _, damage, advice in answers if damage]
    if without := [f"{damage} {advice}" for damage, advice in damages if advice]:
        raise ValueError(without[0])
    if damages:
        logger.warning("%s It is made again from the last checkpoint; no step is taken.", damages[0][0])
        return None
    return already_finished(args, answers[0][0])


def look_for_complete(args) -> tuple[dict | None, str | None, str | None]:
    """Return (the state of a complete run, what its directory has lost, what to do if no checkpoint restores it)."""
    state, directory = read_complete(args), Path(args.output_dir)
    damage = None if state is None else find_damage(directory)
    return state, damage, damage and get_advice(directory, state["global_step"])


def get_advice(directory: Path, num_steps: int) -> str | None:
    """Return what to do about a finished directory that is damaged; None if a checkpoint holds its last step."""
    complete = next((path for path in paper.checkpoints_in(directory) if paper.is_complete(path)), None)
    again = "or train again from the beginning with --resume_from_checkpoint False"
    if complete is None:
        return f"There is no complete checkpoint-N to make it from: copy the file back, {again}."
    step = paper.get_step(complete)
    if step == num_steps:
        return None
    return (
        f"The newest complete checkpoint, {complete.name}, is not of the last step: copy the file back, or train the "
        f"last {count(num_steps - step, 'step')} again with --resume_from_checkpoint {shlex.quote(str(complete))}, "
        f"{again}."
    )


def read_complete(args) -> dict | None:
    """Return the state of a complete run of as many steps as the flags ask for, None if there is none."""
    directory = Path(args.output_dir)
    if not (directory / STATE).is_file():
        return None
    try:
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except ValueError:
        return None
    steps, epochs = state.get("global_step") or 0, state.get("epoch") or 0
    if not steps or steps < state.get("max_steps", 0):
        return None
    # Half a step of tolerance: the last epoch of packs may be a little short of a full one.
    enough = steps >= args.max_steps if args.max_steps > 0 else epochs + epochs / steps / 2 >= args.num_train_epochs
    return state if enough and not asks_for_other_steps(args) else None


def asks_for_other_steps(args) -> bool:
    """Tell whether the newest checkpoint was written with other flags; False without a checkpoint.

    Flags of the schedule, such as the rate, do not count: a run without steps left would take none at another rate.
    """
    checkpoints = paper.checkpoints_in(args.output_dir)
    if not checkpoints:
        return False
    try:
        manifest = paper.read_manifest(checkpoints[0])
    except ValueError:
        # Reported when the run looks for a checkpoint to resume from.
        return True
    before = manifest["steps"]
    # Divided among another number of ranks, a step is still the same step.
    same = DIVISION if global_batch(before) == global_batch(vars(args) | {RANKS: args.world_size}) else ()
    known = {name: value for name, value in before.items() if hasattr(args, name) and name not in same}
    return any(getattr(args, name) != value for name, value in known.items())


def already_finished(args, state: dict) -> str:
    """Return the message for a finished run that is started again."""
    directory, ends = args.output_dir, get_ends(get_losses(state.get("log_history", ())))
    done = f"{count(state['global_step'], 'step')}, {count(round(state['epoch'], 2), 'epoch')}"
    done += f", loss {loss_text(ends.last)} at the end" if ends else ""
    if any(Path(directory).glob("checkpoint-*")):
        by_steps = args.max_steps > 0
        more = f"--max_steps {2 * args.max_steps}" if by_steps else f"--num_train_epochs {args.num_train_epochs + 1:g}"
        continued = f"{more}, for example"
    else:
        continued = (
            f"--model_name_or_path {shlex.quote(directory)} and another --output_dir, since no checkpoint is left"
        )
    return (
        f"{directory} holds a finished run ({done}): nothing was trained.\n{_other_schedule(args)}"
        f"  to train on:     {continued}\n"
        "  to train again:  another --output_dir, or --resume_from_checkpoint False, which replaces the model\n"
        f"  to chat with it:   {chat_command(directory)}"
        + (f"\n  to upload it:      {push_command(args)}" if args.push_to_hub else "")
    )


def _other_schedule(args) -> str:
    """Return a line on the flags of the schedule that have no effect now, "" if there are none."""
    try:
        saved = paper.read_manifest(paper.checkpoints_in(args.output_dir)[0])["schedule"]
    except (IndexError, ValueError):
        return ""
    changed = [
        f"{name} was {value}, is {getattr(args, name)}"
        for name, value in saved.items()
        if name not in LENGTHS and getattr(args, name, value) != value
    ]
    return f"  without effect:  {'; '.join(changed)}\n" if changed else ""


def start_again(args, checkpoint) -> None:
    """Delete the state of a complete run from the directory that a run is about to train in."""
    directory = Path(args.output_dir)
    if not args.should_save or not (directory / STATE).is_file():
        return
    if checkpoint is False:
        logger.warning("%s holds a finished run; its model is replaced when this run has ended.", directory)
    (directory / STATE).unlink()
