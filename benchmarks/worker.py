"""Turn a rival into a process that does a step when it is told to and says what it cost; started by `Worker`.

Each rival has a process of its own: its peak of memory is its own, and it may live on libraries of its own. Lines of
JSON go both ways; what a rival prints goes to a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

# Seconds that setting up or one step may take.
LIMIT_S = 600
ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A rival in a process of its own. rival: a key of RIVALS; batches are told by size, stage and count."""

    def __init__(self, rival, size, stage, count, repeats=1, options=None, threads=2, python_path=None, warmup=0):
        """repeats: times that each batch behind `warmup` ones comes, 2 for the rival that is compared with itself."""
        self.name = rival
        self.spec = {"rival": rival, "size": size, "stage": stage, "count": count, "repeats": repeats}
        self.spec |= {"options": options or {}, "threads": threads, "warmup": warmup}
        paths = [str(ROOT), *(python_path or "").split(os.pathsep), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.steps = []

    def wait_ready(self):
        """Wait until the model is loaded."""
        self.loaded_bytes = self._answer()["loaded_bytes"]
        return self

    def step(self):
        """Do a step; return its (wall, CPU) seconds."""
        answer = self._ask("step")
        self.steps.append(answer)
        return answer["wall_s"], answer["cpu_s"]

    def close(self) -> dict:
        """End the process; return its memory and what its steps said of themselves."""
        end = self._ask("stop")
        self.process.wait()
        return {
            "loaded_bytes": self.loaded_bytes,
            "above_loaded_bytes": end["peak_bytes"] - self.loaded_bytes,
            "losses": [step["loss"] for step in self.steps],
            "gradient_norms": [step["gradient_norm"] for step in self.steps],
        }

    def kill(self):
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()

    def _ask(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        # A rival that hangs is killed; its end of the line then reads as nothing.
        timer, start_s = threading.Timer(LIMIT_S, self.process.kill), time.monotonic()
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        late = f" after {LIMIT_S} s without an answer" if time.monotonic() - start_s >= LIMIT_S else ""
        raise RuntimeError(f"{self.name} ended with {code}{late}; it said:\n{self.errors.read()[-3000:]}")


def give_back_memory():
    """Return freed memory to the system, so that what is resident is what is in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return


def main(spec):
    """Run the rival of a spec, a step a line of stdin."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    from benchmarks.timing import forget_peak, peak_rss_bytes
    from benchmarks.workload import batches, size_of

    torch.set_num_threads(spec["threads"])
    size = size_of(spec["size"], spec["stage"])
    drawn = batches(size, spec["stage"], spec["count"])
    warmup = drawn[: spec["warmup"]]
    schedule = warmup + [one for one in drawn[spec["warmup"] :] for _ in range(spec["repeats"])]
    clocks = {}

    def tell(step):
        if step is None:
            give_back_memory()
            answer = {"loaded_bytes": forget_peak()}
        else:
            wall_s, cpu_s = time.perf_counter() - clocks["wall"], time.process_time() - clocks["cpu"]
            answer = {"wall_s": wall_s, "cpu_s": cpu_s, **asdict(step)}
        channel.write(json.dumps(answer) + "\n")
        if sys.stdin.readline().strip() != "step":
            channel.write(json.dumps({"peak_bytes": peak_rss_bytes()}) + "\n")
            channel.flush()
            # Nothing that a trainer does at its end is wanted.
            os._exit(0)
        clocks.update(wall=time.perf_counter(), cpu=time.process_time())

    if spec["rival"] == "LLaVA":
        from benchmarks.original import original_loop as rival
    else:
        from benchmarks.rivals import RIVALS

        rival = RIVALS[spec["rival"]]
    rival(size, spec["stage"], schedule, spec["options"], tell)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
