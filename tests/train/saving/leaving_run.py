"""Train a run of 3 steps with workers that is held at its end, and say how many workers are left.

    python leaving_run.py OUTPUT_DIR frame|worker|stopped

frame: something keeps a frame of the epoch, as an error in a cycle does. worker: one ignores that it is to end.
stopped: one is stopped by a signal.
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
    """Holds the run at a step in the middle of its epoch."""

    def __init__(self, how):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        """Do it."""
        if self.how == "frame":
            kept.append(sys._getframe())
        elif not kept:
            kept.append(multiprocessing.Process(target=signal.pause, daemon=True))
            kept[0].start()
            if self.how == "stopped":
                os.kill(kept[0].pid, signal.SIGSTOP)


if __name__ == "__main__":
    gc.disable()
    build_trainer(sys.argv[1], callbacks=[Hold(sys.argv[2])], max_steps=3, dataloader_num_workers=2).train()
    print("left", len(multiprocessing.active_children()), flush=True)
