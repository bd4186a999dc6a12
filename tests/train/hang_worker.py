"""Train with a fault: `hang_worker.py FAULT FLAGS...`; started by test_hangs.py.

The faults: rank_hangs, of rank 1 in the forward pass of step 2. worker_hangs, worker_dies: of the loader worker that
reads toy_005.
"""

import os
import signal
import sys
import time

from llava_lite.data.dataset import LazySupervisedDataset
from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.train import main


def add_fault(owner, name, fault):
    """Call `fault` with the arguments of a method before the method itself."""
    theirs = getattr(owner, name)

    def method(*args, **kwargs):
        fault(*args)
        return theirs(*args, **kwargs)

    setattr(owner, name, method)


def hang_in_step(trainer, *args):
    if trainer.state.global_step == 1 and os.environ.get("RANK") == "1":
        time.sleep(10_000)


def hang_in_worker(dataset, record, image):
    if record.id == "toy_005":
        time.sleep(10_000)


def die_in_worker(dataset, record, image):
    if record.id == "toy_005":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    fault, *flags = sys.argv[1:]
    if fault == "rank_hangs":
        add_fault(LLaVATrainer, "compute_loss", hang_in_step)
    if fault in ("worker_hangs", "worker_dies"):
        # Where an image is looked for: after the note of what is read.
        hurt = hang_in_worker if fault == "worker_hangs" else die_in_worker
        add_fault(LazySupervisedDataset, "image_path", hurt)
    main(flags)
