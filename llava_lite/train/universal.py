"""Turn the files of one number of ranks into the state of an engine on another, by DeepSpeed's universal checkpoint.

Universal Checkpointing (Lian et al. 2024, arXiv 2406.18820; deepspeed.checkpoint.ds_to_universal): each weight with
its two moments of Adam becomes a file of its own, from which every rank takes its new share.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from llava_lite.model.engine_files import engine_folder, read_state, refuse_code
from llava_lite.train import manifest as paper
from llava_lite.train.ranks import everyone, raise_together

logger = logging.getLogger(__name__)

CONVERTER = "deepspeed.checkpoint.ds_to_universal"
# Written beside the converted files once they are whole, or with the reason why they are not.
ENDED = "ended"
# What a launcher tells a rank; the converter is none.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOK_EVERY_S = 0.5


def load_universal(engine, path: str, workspace: str | Path, is_converter: bool) -> None:
    """Load a checkpoint that another number of ranks saved; all ranks must call it, one of them converts.

    workspace: a directory that all ranks see, with room for twice the optimizer; left as it was. Raises ValueError on
    every rank with what could not be done.
    """
    folder = engine_folder(path)
    there = Path(workspace) / everyone(f"{paper.STAGING_PREFIX}checkpoint-universal-{time.time_ns()}")[0]
    advice = f"{path} stays as it is: start as many ranks as saved it, or open it as the model of a new run."
    _together(lambda: make_room(folder, there) if is_converter else None, advice)
    try:
        _together(lambda: convert(folder, there) if is_converter else wait_for(there), advice)
        with taking_universal(engine):
            loaded, _ = engine.load_checkpoint(str(there), load_module_strict=False)
        settle_groups(engine.basic_optimizer, read_state(there / folder.name / "zero" / "optimizer_state.pt"))
        if loaded is None:
            raise ValueError(f"DeepSpeed found no state it can use in what it made of {path}. {advice}")
        # None is still reading when the files go.
        everyone(None)
    finally:
        if is_converter:
            shutil.rmtree(there, ignore_errors=True)


def _together(work, advice: str) -> None:
    """Do a part of the work on every rank; raise on all if it fails on one."""
    error = None
    try:
        work()
    except (OSError, ValueError) as problem:
        error = problem
    raise_together(error, ValueError, advice)


def make_room(folder: Path, there: Path) -> None:
    """Make the directory of the converted files, if nothing in the checkpoint is code and the disk has room."""
    refuse_code(folder)
    # Fragments of every rank and what they become are there at the same time.
    needed_bytes = 2 * sum(file.stat().st_size for file in folder.rglob("*.pt"))
    there.parent.mkdir(parents=True, exist_ok=True)
    paper.check_room(there.parent, needed_bytes)
    there.mkdir()


def convert(folder: Path, there: Path) -> None:
    """Write an engine's files anew for any number of ranks, in a process of its own; ValueError with its last words.

    It starts processes and prints a page; none of that is this rank's.
    """
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(folder), "--output_folder"]
    # DeepSpeed asks for a note on how weights were divided otherwise than among ranks: they were not.
    command += [str(there / folder.name), "--inject_missing_state"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    started_s = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    last += " (it knows the moments of Adam and no other optimizer's)" if "exp_avg" in last else ""
    failed = "" if done.returncode == 0 else f"DeepSpeed's {CONVERTER} could not convert {folder}: {last}"
    if failed:
        shutil.rmtree(there / folder.name, ignore_errors=True)
    (there / ENDED).write_text(failed, encoding="utf-8")
    if failed:
        raise ValueError(failed)
    logger.info("%s was converted for another number of ranks in %.0f s.", folder, time.monotonic() - started_s)


def wait_for(there: Path) -> None:
    """Return when the rank that converts is done.

    Not in a collective, whose time limit is shorter than the conversion of a large model.
    """
    while not (there / ENDED).is_file():
        time.sleep(_LOOK_EVERY_S)


def settle_groups(optimizer, converted: dict) -> None:
    """Give each group of weights its own settings and its own count of steps.

    ZeRO-3 (DeepSpeed 0.19.8) gives all groups the settings of the first, weight decay among them, and puts one tensor
    in the place of all counts, which torch's Adam then counts up once a group: losses differ by 1e-3 from the second
    step on.
    """
    for group, saved in zip(optimizer.param_groups, converted["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextmanager
def taking_universal(engine):
    """Let an engine read what was converted, as `"checkpoint": {"load_universal": true}` in its JSON does.

    For one load: with it in the JSON no checkpoint of the run itself could be read afterwards.
    """
    engine.load_universal_checkpoint = lambda: True
    try:
        yield
    finally:
        del engine.load_universal_checkpoint
