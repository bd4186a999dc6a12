"""Train a run of 3 steps with workers that is held at its end, and say how many workers are left.

    python leaving_run.py OUTPUT_DIR frame|child|worker

frame: something keeps a frame of the epoch, as an error in a cycle does. child: a daemonic process that was started in
training never looks up. worker: one of the loader is stopped by a signal after the last step.
"""

import gc
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_run import build_trainer

kept = []


class Hold(TrainerCallback):
    """Does in a step what holds the run at its end, in the middle of an epoch."""

    def __init__(self, how):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        """Do it."""
        if self.how == "frame":
            kept.append(sys._getframe())
        elif self.how == "child" and not kept:
            kept.append(multiprocessing.Process(target=signal.pause, daemon=True))
            kept[0].start()
        elif self.how == "worker" and state.global_step == state.max_steps:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)


if __name__ == "__main__":
    gc.disable()
    build_trainer(sys.argv[1], callbacks=[Hold(sys.argv[2])], max_steps=3, dataloader_num_workers=2).train()
    print("left", len(multiprocessing.active_children()), flush=True)
