"""Kill a run with SIGKILL in the middle of its saves, again and again: `killed_saves.py FOLDER VISITS RANDOM`.

Each round is a fork that resumes and saves after every step. Prints a line RESULT {json}: what was found after each
kill, and whether the run that got through in the end has the weights and losses of one that was never killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from plain_run import build_trainer, losses_of, weights_of

from llava_lite.train import manifest as paper
from llava_lite.train.resume import find_checkpoint

STEPS = {"save_steps": 1, "num_train_epochs": 4, "save_total_limit": 2}


def train(folder):
    """Train in this process, from the newest whole checkpoint if there is one."""
    trainer = build_trainer(folder, **STEPS)
    trainer.train(resume_from_checkpoint=find_checkpoint(folder, None))
    return trainer


def die_at(place):
    """Make this process kill itself just before the n-th time that it reaches a place in the save."""
    name, count = place
    stock, reached = getattr(paper, name), [0]

    def deadly(*args, **kwargs):
        reached[0] += 1
        if reached[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*args, **kwargs)

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


def round_of_kill(folder, place, rng):
    """Start a run and kill it, at a place in the save or at a random instant; return what it left."""
    before = newest_step(folder)

    def work():
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        if place is not None:
            die_at(place)
        train(folder)

    child = in_child(work)
    if place is None:
        deadline = time.monotonic() + 30
        while not Path(folder, f"checkpoint-{before + 2}").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    names = {path.name for path in Path(folder).glob("checkpoint-*")}
    broken = [name for name in names if not paper.is_whole(Path(folder) / name)]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"place": place, "killed": killed, "before": before, "after": newest_step(folder), "broken": broken}


def newest_step(folder):
    """Return the step of the newest whole checkpoint, -1 without one."""
    return max((paper.step_of(path) for path in paper.checkpoints_in(folder) if paper.is_whole(path)), default=-1)


def main(folder, num_visits, num_random):
    """Kill at each named place on its first visits and at random instants, then let the run end and compare."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    names = ("settle", "check_room", "fsync_tree", "digests", "write_json", "publish", "prune", "files_of", "fsync")
    places = [(name, 1 + 2 * visit) for name in names for visit in range(int(num_visits))] + [None] * int(num_random)
    rng.shuffle(places)
    rounds = [round_of_kill(f"{folder}/killed", place, rng) for place in places]
    whole, resumed = build_trainer(f"{folder}/whole", **STEPS), None
    whole.train()
    resumed = train(f"{folder}/killed")
    expected = weights_of(whole)
    same = all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    left = sorted(path.name for path in Path(folder, "killed").iterdir())
    same_losses = losses_of(whole) == losses_of(resumed)
    print("RESULT " + json.dumps({"rounds": rounds, "weights": same, "losses": same_losses, "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
