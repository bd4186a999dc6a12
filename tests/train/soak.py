"""Train a run under faults, start it again after each one, and compare it with the run that was never touched.

    python tests/train/soak.py DIRECTORY --faults 40 [--ranks 2] [--seed 0] -- FLAGS OF llava-lite train

Faults come at random instants: a rank or a loader worker is killed (SIGKILL) or stopped (SIGSTOP, as if it hung), the
disk fills up, or the run gets SIGTERM, SIGINT or SIGHUP. The disk is a small one of its own where this process may
mount it, else a limit on the size of files. Writes run_N.log, soak.jsonl (a line for each fault), soak.png and
result.json. Its status is 1 where the runs differ or a fault was not answered as it should be; the checkpoints that
signals write are no difference. The flags, or a YAML file and flags, name no --output_dir.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MODULE = "llava_lite.train.train"
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
EXIT_RESUMABLE = 75
# Depends on the clock.
NOT_COMPARED = {"tokens_per_s", "mfu", "runtime", "samples_per_second", "steps_per_second"}
# Faults after which the log must name the process.
NAMED = {"killed worker", "stopped worker", "stopped rank"}
# No answer to a fault takes longer, the timeout of hung processes included.
LIMIT_S = 300
DISK_MB = 96
# Batches that loader workers have ready, at most.
STEPS_AHEAD = 6
# In the environment of all processes of all runs: a launcher gives its ranks sessions of their own.
MARK = "LLAVA_LITE_SOAK_PID"


class Disk:
    """A place for the output that can be filled up: a tmpfs of its own, or this disk with a limit on files."""

    def __init__(self, directory: Path):
        self.directory, self.ballast, self.is_mounted = directory, directory / "ballast", False

    def open(self) -> None:
        """Make it."""
        self.directory.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.directory)]
        self.is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, processes) -> None:
        """Leave no room for another file of these processes."""
        if not self.is_mounted:
            for process in processes:
                with suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return
        with suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def clear(self) -> None:
        """Make room again."""
        self.ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if os.path.ismount(self.directory):
            subprocess.run(["umount", "-l", str(self.directory)], check=False)


class Run:
    """A process, or a launcher with its ranks, that trains into `output`."""

    def __init__(self, flags, output: Path, log: Path, num_ranks: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--master_port", port]
        command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", MODULE, *flags]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: str(os.getpid())}
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(output)],
                env=os.environ | own,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.output, self.num_ranks = output, num_ranks

    def ranks(self):
        """Return the processes that train."""
        root = psutil.Process(self.process.pid)
        return [root] if self.num_ranks == 1 else [one for one in root.children() if is_ours(one)]

    def workers(self):
        """Return the processes of the loaders."""
        return [one for rank in self.ranks() for one in rank.children() if is_ours(one)]

    def step(self) -> int:
        """Return the last step of the log."""
        lines = read_log(self.output)
        return max((line["step"] for line in lines), default=0)

    def wait(self, limit_s: float) -> int | None:
        """Return the exit status, None where there is none in time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(limit_s)
        return None

    def end(self) -> None:
        """Kill what is left of it."""
        kill_runs()
        self.process.wait()


def kill_runs() -> None:
    """Kill every process of every run that this one has started."""
    for _ in range(100):
        left = [process for process in psutil.process_iter() if is_of_run(process)]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if not left:
            return
        # Until they are gone, with what they started meanwhile.
        time.sleep(0.05)


def is_of_run(process) -> bool:
    """Return whether a process belongs to a run that this one has started."""
    with suppress(psutil.Error, OSError):
        return process.environ().get(MARK) == str(os.getpid())
    return False


def is_ours(process) -> bool:
    """Return whether a process is a rank or one of its loader's workers."""
    with suppress(psutil.Error):
        return MODULE in process.cmdline() and "torch.distributed.run" not in process.cmdline()
    return False


def read_log(output: Path) -> list[dict]:
    """Return the lines of the run's log; one that is being written is left out."""
    path, lines = output / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def do(kind: str, run: Run, disk: Disk, rng: random.Random) -> str | None:
    """Do a fault to a run and return whom it met; None where there is nobody left."""
    with suppress(psutil.Error, ProcessLookupError, IndexError):
        if kind == "full disk":
            disk.fill(run.ranks())
            return "the disk"
        if kind in SIGNALS:
            os.killpg(run.process.pid, SIGNALS[kind])
            return "all processes"
        verb, whom = kind.split()
        victim = rng.choice(run.ranks() if whom == "rank" else run.workers())
        victim.send_signal(signal.SIGKILL if verb == "killed" else signal.SIGSTOP)
        return f"process {victim.pid}"
    return None


def is_answered(line: dict) -> bool:
    """Return whether a run ended as it should after a fault: before its first step a signal ends it at once."""
    kind, code = line["fault"], line["code"]
    if line.get("was_idle"):
        return True
    if line.get("met") is None:
        return code == 0
    if kind in SIGNALS:
        # A launcher that gets the signal reports 1, or dies of it.
        may_end_at_once = line["step"] <= line["from_step"] or line["ranks"] > 1
        return code == EXIT_RESUMABLE or (may_end_at_once and code in (-SIGNALS[kind], 128 + SIGNALS[kind], 1))
    return code not in (0, None) and line.get("is_named", True)


def soak(directory: Path, flags, num_faults: int, num_ranks: int, seed: int, total: int) -> list[dict]:
    """Run until the run of `total` steps is complete, with a fault in each of the first rounds.

    Returns the lines of soak.jsonl.
    """
    rng, lines = random.Random(seed), []
    kinds = [*SIGNALS, "killed rank", "killed worker", "full disk", "stopped worker"]
    # A process alone has nobody who could notice that it is stopped.
    kinds += ["stopped rank"] if num_ranks > 1 else []
    order = [kinds[i % len(kinds)] for i in range(num_faults)]
    rng.shuffle(order)
    with mounted(directory / "disk") as disk, open(directory / "soak.jsonl", "w", encoding="utf-8") as file:
        output = disk.directory / "run"
        for number, kind in enumerate([*order, None]):
            run, start_s = Run(flags, output, directory / f"run_{number}.log", num_ranks), time.monotonic()
            before = run.step()
            line = {"round": number, "fault": kind, "from_step": before, "ranks": num_ranks}
            if kind is not None:
                # Twice the mean, so that the faults cover the run; some come before its first step.
                left = len(order) - number
                wanted = before + rng.randint(0, max(1, 2 * (total - before) // (left + 2)))
                line["met"] = fault_at(run, kind, wanted, disk, rng)
            line |= {"step": run.step(), "after_s": round(time.monotonic() - start_s, 1)}
            code = wait_after(run, line)
            line |= {"code": code, "seconds": round(time.monotonic() - start_s, 1)}
            if kind in NAMED and line["met"] and not line.get("was_idle"):
                pid = line["met"].removeprefix("process ")
                log = (directory / f"run_{number}.log").read_text(encoding="utf-8", errors="replace")
                line["is_named"] = re.search(rf"pid:? {pid}\b", log) is not None
            line["answered"] = is_answered(line)
            run.end()
            disk.clear()
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)
            if code == 0:
                break
        keep(output, directory / "touched")
    return lines


def wait_for_end(run: Run) -> int | None:
    """Return the exit status of a run, None once it has made no step for LIMIT_S seconds."""
    while True:
        step, code = run.step(), run.wait(LIMIT_S)
        if code is not None or run.step() == step:
            return code


def wait_after(run: Run, line: dict) -> int | None:
    """Return the exit status of a run after its fault, None for one that hangs.

    One that met an idle worker is killed some steps later, or ends as ever.
    """
    if line["fault"] is None:
        return wait_for_end(run)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (code := run.wait(0.5)) is not None:
            if code == 0 and line["fault"].endswith("worker"):
                # Nothing that the run needs was left for it to read.
                line["was_idle"] = True
            return code
        if line["fault"].endswith("worker") and run.step() > line["step"] + 3 * STEPS_AHEAD:
            line["was_idle"] = True
            kill_runs()
    return None


@contextmanager
def mounted(directory: Path):
    """Yield a disk that can be filled up, and unmount it at the end."""
    disk = Disk(directory)
    try:
        disk.open()
        yield disk
    finally:
        disk.close()


def fault_at(run: Run, kind: str, wanted: int, disk: Disk, rng: random.Random) -> str | None:
    """Wait until the run is at a step, and do the fault a random instant later; None where it had ended before."""
    while run.process.poll() is None and run.step() < wanted:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.3))
    return None if run.process.poll() is not None else do(kind, run, disk, rng)


def keep(output: Path, place: Path) -> None:
    """Copy what is compared from the disk of the run."""
    subprocess.run(["cp", "-r", str(output), str(place)], check=True)


def read_flags(flags) -> dict:
    """Return {name: values} of the flags of the run, in both spellings and from a YAML file before them."""
    sys.path.insert(0, str(ROOT))
    from llava_lite.train.arguments.legacy import open_yaml, split_flags

    return dict(split_flags(open_yaml(flags)))


def facts(output: Path) -> dict:
    """Return what must be equal: the weights of the final directory and of checkpoints, and every logged number.

    {"files": {directory: {file: hash}}, "log": lines}; the final directory is ".".
    """
    files = {path.name: {} for path in output.glob("checkpoint-*") if path.name[11:].isdigit()} | {".": {}}
    for path in sorted(output.rglob("*.safetensors")):
        name = path.relative_to(output)
        owner = name.parts[0] if name.parts[0] in files else "."
        files[owner][name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [
        {k: v for k, v in line.items() if not any(k.endswith(name) for name in NOT_COMPARED)}
        for line in read_log(output)
    ]
    return {"files": files, "log": lines}


def find_differences(expected: dict, found: dict, limit: int | None = None) -> dict[str, list[str]]:
    """Compare the facts of the untouched run with those of the other; return {"files": sentences, "log": sentences}.

    A checkpoint that only the other run has was written after a signal. One that it lacks is a difference, unless
    `limit` newer ones are there, after which a run deletes it.
    """
    files, log = [], []
    for name, hashes in expected["files"].items():
        theirs = found["files"].get(name)
        if theirs is None:
            num_newer = sum(get_step(other) > get_step(name) for other in found["files"] if other != ".")
            files += [] if limit is not None and num_newer >= limit else [f"{name} is missing"]
            continue
        files += [f"{file} is missing" for file in sorted(hashes.keys() - theirs.keys())]
        files += [f"{file} is not in the untouched run" for file in sorted(theirs.keys() - hashes.keys())]
        files += [f"{file} differs" for file in sorted(hashes.keys() & theirs.keys()) if hashes[file] != theirs[file]]
    for number, (mine, theirs) in enumerate(zip(expected["log"], found["log"], strict=False), 1):
        if mine != theirs:
            log.append(f"line {number} is {theirs}; in the untouched run {mine}")
            break
    if len(expected["log"]) != len(found["log"]):
        log.append(f"{len(found['log'])} lines; in the untouched run {len(expected['log'])}")
    return {"files": files, "log": log}


def get_step(name: str) -> int:
    """Return the step of checkpoint-N."""
    return int(name.removeprefix("checkpoint-"))


def get_limit(flags: dict) -> int | None:
    """Return how many newer checkpoints a run keeps; None where it deletes none."""
    text = " ".join(flags.get("save_total_limit", "0"))
    if not text.lstrip("-").isdigit():
        raise ValueError(f"--save_total_limit needs a whole number; got {text!r}")
    limit = int(text)
    # The best one stays, however old it is.
    has_best = not {"load_best_model_at_end", "metric_for_best_model"}.isdisjoint(flags)
    return max(1, limit - has_best) if limit > 0 else None


def draw(directory: Path, lines: list[dict]) -> None:
    """Draw the loss of both runs and the faults into soak.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, style in (("untouched", {"lw": 3, "color": "0.8"}), ("touched", {"lw": 0.8, "color": "tab:blue"})):
        log = [line for line in read_log(directory / name) if "loss" in line]
        axes.plot([line["step"] for line in log], [line["loss"] for line in log], label=f"{name} run", **style)
    kinds = sorted({line["fault"] for line in lines if line.get("met")})
    for i, kind in enumerate(kinds):
        steps = [line["step"] for line in lines if line.get("met") and line["fault"] == kind]
        axes.plot(steps, [-0.04 - 0.035 * i] * len(steps), "|", ms=9, mew=2, color=f"C{i + 1}", label=kind,
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss", title=f"{sum(bool(line.get('met')) for line in lines)} faults")
    axes.tick_params(axis="x", pad=8 + 10 * len(kinds))
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(directory / "soak.png", dpi=150)


@contextmanager
def cleaning_up():
    """Kill the runs at the end, after a signal too; one that is ignored here, as under nohup, ends nothing."""

    def leave(number, frame):
        for other in SIGNALS.values():
            signal.signal(other, signal.SIG_IGN)
        with suppress(OSError):
            print(f"ended by {signal.Signals(number).name}; no run and no mount is left", file=sys.stderr)
        sys.exit(128 + number)

    for number in SIGNALS.values():
        # The runs would ignore what is ignored here; a handler is not theirs.
        is_ignored = signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, (lambda number, frame: None) if is_ignored else leave)
    try:
        yield
    finally:
        kill_runs()


def main(argv=None) -> int:
    """Train untouched, then under faults; print and write the comparison; return 0 where the runs are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+")
    args = parser.parse_args(argv)
    if args.faults < 0 or args.ranks < 1:
        parser.error(f"expected --faults 0 or more and --ranks 1 or more; got {args.faults} and {args.ranks}")
    try:
        flags = read_flags(args.flags)
        limit = get_limit(flags)
    except (ValueError, OSError) as error:
        parser.error(f"the flags of the run: {error}")
    if "output_dir" in flags:
        parser.error(f"the runs write into {args.directory}: leave out --output_dir {' '.join(flags['output_dir'])}")
    if os.path.lexists(args.directory):
        parser.error(f"{args.directory} exists: name a directory that does not, or remove it")
    with cleaning_up():
        return compare(args, limit)


def compare(args, limit: int | None) -> int:
    """Do what `main` does; limit: of `find_differences`."""
    args.directory.mkdir(parents=True)
    start_s = time.monotonic()
    full = Run(args.flags, args.directory / "untouched", args.directory / "untouched.log", args.ranks)
    try:
        code = wait_for_end(full)
    finally:
        full.end()
    if code != 0:
        print(f"the untouched run ended with {code}; see {args.directory / 'untouched.log'}")
        return 1
    untouched_s = time.monotonic() - start_s
    total = full.step()
    lines = soak(args.directory, args.flags, args.faults, args.ranks, args.seed, total)
    draw(args.directory, lines)
    differences = find_differences(facts(args.directory / "untouched"), facts(args.directory / "touched"), limit)
    met = [line for line in lines if line.get("met")]
    result = {
        "steps": total,
        "faults": {kind: sum(line["fault"] == kind for line in met) for kind in sorted({one["fault"] for one in met})},
        "not answered": [line for line in lines if not line["answered"]],
        "equal": {key: not found for key, found in differences.items()},
        "differences": differences,
        "untouched_s": round(untouched_s),
        "touched_s": round(sum(line["seconds"] for line in lines)),
    }
    (args.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if all(result["equal"].values()) and not result["not answered"] else 1


if __name__ == "__main__":
    sys.exit(main())
