"""Load an engine's checkpoint on other ranks, or under another stage, than saved it: DeepSpeed's universal checkpoint.

Universal Checkpointing (Lian et al. 2024, arXiv 2406.18820; deepspeed.checkpoint.ds_to_universal): each weight with
the two moments of Adam becomes a file of its own, from which every rank reads its new shard.
"""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from llava_lite.checkpoints.engine_files import check_no_code, engine_directory, read_state
from llava_lite.distributed.ranks import everyone
from llava_lite.train.deepspeed.converter import FORCED, UNDOES
from llava_lite.train.deepspeed.private import safe_load, universal_load
from llava_lite.train.saving import manifest as paper
from llava_lite.train.together import together

logger = logging.getLogger(__name__)

CONVERTER = "llava_lite.train.deepspeed.converter"
# Beside the converted files: the second is the new name of the first once the converter has ended, well or not. A
# full disk has room for a new name.
RUNNING, ENDED = "running", "ended"
# The variables by which a launcher describes a rank; the converter is not one.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_EVERY_S = 0.5
# Of ZeRO-0 to 2, and of ZeRO-3.
STATE_NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def load_universal(engine, path: str, workspace: str | Path, is_converter: bool) -> None:
    """Load a checkpoint of other ranks or another stage; all ranks must call it, one of them converts.

    workspace: a directory that all ranks see, with room for twice the optimizer; it is left as it was. Raises
    ValueError on every rank with what failed.
    """
    directory = engine_directory(path)
    there = Path(workspace) / everyone(f"{paper.STAGING_PREFIX}checkpoint-universal-{time.time_ns()}")[0]
    advice = f"{path} is unchanged: start as many ranks as saved it, or open it as the model of a new run."
    with together(ValueError, advice, (OSError, ValueError)):
        if is_converter:
            make_room(directory, there)
    try:
        with together(ValueError, advice, (OSError, ValueError)):
            convert(directory, there) if is_converter else wait_for(there)
        with together(ValueError, advice, (OSError, ValueError)):
            if is_converter:
                fit_stage(there / directory.name, engine)
        with universal_load(engine), safe_load(engine):
            loaded, _ = engine.load_checkpoint(str(there), load_module_strict=False)
        resolve_groups(engine.basic_optimizer, read_state(there / directory.name / "zero" / "optimizer_state.pt"))
        if loaded is None:
            raise ValueError(f"DeepSpeed found no state it can use in what it made of {path}. {advice}")
        # A barrier: no rank is still reading when the files are deleted.
        everyone(None)
    finally:
        if is_converter:
            shutil.rmtree(there, ignore_errors=True)


def fit_stage(converted: Path, engine) -> None:
    """Give converted files the names, and the form, that the stage of `engine` reads; nothing where they have both.

    DeepSpeed's converter writes each weight for the stage that saved it (0.19.8). Of ZeRO-0 to 2 it is a dict with a
    tensor of the weight's shape, and a counter of steps; of ZeRO-3 a flat tensor, with one counter for all weights.
    """
    is_3 = engine.zero_optimization_partition_weights()
    name, other = STATE_NAMES if is_3 else STATE_NAMES[::-1]
    if (converted / other).is_file():
        return
    # Only settings are read from it.
    os.link(converted / name, converted / other)
    file = converted / "zero" / "optimizer_state.pt"
    # Not mapped: the files are written again.
    state = read_state(file, mmap=False)
    if is_3:
        step = read_state(next(file.parent.rglob("step.pt")), mmap=False)
        state["optimizer_state_dict"] = {"param_groups": state["param_groups"], "state": {0: {"step": step}}}
        torch.save(state, file)
        return
    # ZeRO-3 keeps it beside the model alone.
    state["ds_version"] = read_state(converted / other, mmap=False)["ds_version"]
    torch.save(state, file)
    step = next(iter(state["optimizer_state_dict"]["state"].values()))["step"]
    for name, weight in engine.module.named_parameters():
        directory = file.parent / name
        if directory.is_dir():
            torch.save(step, directory / "step.pt")
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                flat = read_state(directory / f"{key}.pt", mmap=False).reshape(-1)
                torch.save({"param": flat[: weight.numel()].reshape(weight.shape).clone()}, directory / f"{key}.pt")


def make_room(directory: Path, there: Path) -> None:
    """Make the directory of the converted files; raise if the checkpoint holds code or the disk is too full."""
    check_no_code(directory)
    # The fragments of every rank and the converted files exist at the same time.
    needed_bytes = 2 * sum(file.stat().st_size for file in directory.rglob("*.pt"))
    there.parent.mkdir(parents=True, exist_ok=True)
    paper.check_room(there.parent, needed_bytes)
    there.mkdir()
    (there / RUNNING).touch()


def convert(directory: Path, there: Path) -> None:
    """Convert an engine's files for any number of ranks, in a process of its own; ValueError with its last line.

    The converter starts processes and prints a page, which does not belong in the output of this rank.
    """
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(directory), "--output_folder"]
    # DeepSpeed requires a description of tensor parallelism; there is none here.
    command += [str(there / directory.name), "--inject_missing_state"]
    environment = {name: value for name, value in os.environ.items() if name not in (*RANK_VARIABLES, UNDOES)}
    environment |= FORCED
    started_s = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    last += " (it converts the moments of Adam and of no other optimizer)" if "exp_avg" in last else ""
    failed = "" if done.returncode == 0 else f"DeepSpeed's {CONVERTER} could not convert {directory}: {last}"
    if failed:
        shutil.rmtree(there / directory.name, ignore_errors=True)
    os.replace(there / RUNNING, there / ENDED)
    if failed:
        raise ValueError(failed)
    took_s = time.monotonic() - started_s
    logger.info("%s was converted for other ranks or another stage in %.0f s.", directory, took_s)


def wait_for(there: Path) -> None:
    """Return once the rank that converts is done.

    Not in a collective, whose timeout is shorter than the conversion of a large model.
    """
    while not (there / ENDED).is_file():
        time.sleep(_POLL_EVERY_S)


def resolve_groups(optimizer, converted: dict) -> None:
    """Give each parameter group its own settings and its own step counter.

    ZeRO-3 (DeepSpeed 0.19.8) gives all groups the settings of the first, weight decay among them, and shares one
    counter tensor, which torch's Adam then increments once for each group: losses differ by 1e-3 from the second step.
    """
    for group, saved in zip(optimizer.param_groups, converted["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
