"""A rank of a small run under a watch: `watch_worker.py TIMEOUT FAULT`, where the fault is one of rank 1.

Started by test_watch.py. Each step both ranks compute alone and then reduce; the fault comes in step 3.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from llava_lite.distributed.activity import STEP, note
from llava_lite.distributed.watch import start_watch, stop_watch, watched

RANK = int(os.environ["RANK"])


def hang():
    time.sleep(10_000)


def hang_in_another_group(group):
    # The ranks wait for one another, each in a collective of its own.
    dist.all_reduce(torch.ones(1), group=group if RANK else None)


def fault_of(name, group):
    if name == "both_wait":
        hang_in_another_group(group)
    if RANK == 0:
        return
    if name == "hang":
        hang()
    if name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "error":
        raise ValueError("the disk is full")


def main(timeout_s, fault):
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    start_watch(timeout_s)
    with watched():
        for step in range(1, 5):
            note(f"step {step}: forward", STEP)
            if step == 3:
                fault_of(fault, group)
            note(f"step {step}: reduce", STEP)
            dist.all_reduce(torch.ones(1))
    stop_watch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
