"""Run some steps of one training rival in this process and print what they took; started by benchmarks.training.

python -m benchmarks.worker '{"rival": "ours", "size": "toy", "stage": 1, "options": {}, "seed": 0, ...}'
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time


def give_back_memory():
    """Return freed memory to the system, so that resident memory is what is in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return


class StepClock:
    """Times the steps of a rival, which calls it with None when it is ready and with a Step after each step.

    After the last step it prints the report as JSON and ends the process: what a trainer does at its end is not timed.
    """

    def __init__(self, num_warmup: int, num_steps: int):
        self.num_warmup, self.num_calls = num_warmup, num_warmup + num_steps
        self.steps, self.loaded_bytes = [], 0

    def __call__(self, step):
        """Take the time since the last call."""
        from benchmarks.timing import forget_peak

        if step is None:
            give_back_memory()
            self.loaded_bytes = forget_peak()
        else:
            wall_s, cpu_s = time.perf_counter() - self.wall, time.process_time() - self.cpu
            self.steps.append((wall_s, cpu_s, step))
        if len(self.steps) == self.num_calls:
            print(json.dumps(self.report()), flush=True)
            os._exit(0)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def report(self) -> dict:
        """Return seconds of the timed steps, peak memory, and losses and gradient norms of all steps."""
        from benchmarks.timing import peak_rss_bytes

        timed = self.steps[self.num_warmup :]
        return {
            "wall_s": sum(wall_s for wall_s, _, _ in timed),
            "cpu_s": sum(cpu_s for _, cpu_s, _ in timed),
            "wall_s_each": [wall_s for wall_s, _, _ in self.steps],
            "loaded_bytes": self.loaded_bytes,
            "above_loaded_bytes": peak_rss_bytes() - self.loaded_bytes,
            "losses": [step.loss for _, _, step in self.steps],
            "gradient_norms": [step.gradient_norm for _, _, step in self.steps],
        }


def main(spec: dict) -> None:
    """Run the rival of a spec; this process ends with its last step."""
    import torch

    from benchmarks.workload import batches, size_of

    torch.set_num_threads(spec["threads"])
    size = size_of(spec["size"], spec["stage"])
    num_warmup, num_steps = spec["num_warmup"], spec["num_steps"]
    schedule = batches(size, spec["stage"], num_warmup + num_steps, spec["seed"])
    if spec["rival"] == "LLaVA":
        from benchmarks.original import original_loop as rival
    else:
        from benchmarks.rivals import RIVALS

        rival = RIVALS[spec["rival"]]
    rival(size, spec["stage"], schedule, spec["options"], StepClock(num_warmup, num_steps))
    raise RuntimeError(f"{spec['rival']} ended after fewer than {num_warmup + num_steps} steps.")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
