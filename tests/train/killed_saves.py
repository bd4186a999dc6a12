"""Kill a run with SIGKILL in the middle of its saves, again and again: `killed_saves.py DIRECTORY PASSES RANDOM`.

Each round is a fork that resumes and saves after every step; a run that came to its end is followed by another. Prints
a line RESULT {json}: what was found after each kill, and whether the runs that got through in the end have the weights
and losses of one that was never killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from plain_run import build_trainer, get_losses, get_weights

from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.resume import find_checkpoint

STEPS = {"save_steps": 1, "num_train_epochs": 4, "save_total_limit": 2}


def train(directory):
    """Train in this process, from the newest complete checkpoint if there is one."""
    trainer = build_trainer(directory, **STEPS)
    trainer.train(resume_from_checkpoint=find_checkpoint(directory, None))
    return trainer


def die_at(place):
    """Make this process kill itself just before the n-th time that it reaches a place in the save."""
    name, count = place
    hf, reached = getattr(paper, name), [0]

    def deadly(*args, **kwargs):
        reached[0] += 1
        if reached[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return hf(*args, **kwargs)

    setattr(paper, name, deadly)


def in_child(work):
    """Run `work` in a fork and return its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def round_of_kill(directory, place, rng):
    """Start a run and kill it, at a place in the save or at a random instant; return what it left."""
    before = newest_step(directory)

    def work():
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        if place is not None:
            die_at(place)
        train(directory)

    child = in_child(work)
    if place is None:
        deadline = time.monotonic() + 30
        while not Path(directory, f"checkpoint-{before + 2}").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    names = {path.name for path in Path(directory).glob("checkpoint-*")}
    broken = [name for name in names if not paper.is_complete(Path(directory) / name)]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"place": place, "killed": killed, "before": before, "after": newest_step(directory), "broken": broken}


def newest_step(directory):
    """Return the step of the newest complete checkpoint, -1 without one."""
    return max(
        (paper.get_step(path) for path in paper.checkpoints_in(directory) if paper.is_complete(path)), default=-1
    )


def main(directory, num_passes, num_random):
    """Kill at each named place on its first passes and at random instants, then let the run end and compare."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    names = (
        "finish_saves",
        "check_room",
        "fsync_tree",
        "digests",
        "write_text",
        "publish",
        "prune",
        "list_files",
        "fsync",
    )
    places = [(name, 1 + 2 * i) for name in names for i in range(int(num_passes))] + [None] * int(num_random)
    rng.shuffle(places)
    killed, rounds = [f"{directory}/killed_0"], []
    for place in places:
        found = round_of_kill(killed[-1], place, rng)
        if not found["killed"]:
            # It came to its end before it reached the place so often.
            killed.append(f"{directory}/killed_{len(killed)}")
            found = round_of_kill(killed[-1], place, rng)
        rounds.append(found)
    full = build_trainer(f"{directory}/full", **STEPS)
    full.train()
    print("RESULT " + json.dumps({"rounds": rounds, "runs": [compare(path, full) for path in killed]}))


def compare(directory, full):
    """Let a killed run come to its end, and return whether it is the one never killed, and what it left."""
    resumed, expected = train(directory), get_weights(full)
    return {
        "weights": all(torch.equal(weight, expected[name]) for name, weight in get_weights(resumed).items()),
        "losses": get_losses(full) == get_losses(resumed),
        "left": sorted(path.name for path in Path(directory).iterdir()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
