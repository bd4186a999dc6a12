"""Train toy stages, full and resumed, and write what each run saw: `resume_cases.py CASES.json RESULTS_RANK.json`.

Started by test_resume.py, alone or by a launcher on several ranks; one start runs many cases. A case: "argv", "output"
(a directory), "resume_from" (steps), "more" (flags of the resumed runs alone), "broken" (guards to take out, see
BREAKS), "full_disk_on" (a rank).
"""

import hashlib
import json
import os
import random
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.saving.manifest import SaveError, newest_complete_checkpoint
from llava_lite.train.saving.trained_weights import trained_state
from llava_lite.train.train import train

RANK = int(os.environ.get("RANK", "0"))
# Depends on the clock.
NOT_COMPARED = {"tokens_per_s", "mfu"} | {
    f"{part}_{name}" for part in ("train", "eval") for name in ("runtime", "samples_per_second", "steps_per_second")
}


# Each takes one guard of the resume out, to show that the comparison sees it.
BREAKS = {
    "random state": {"_load_rng_state": lambda trainer, checkpoint: None},
    "epoch of the sampler": {"set_sampler_epoch": lambda trainer, loader, epoch: None},
    "epoch of the data set": {"begin_epoch": lambda trainer, epoch: None},
    "counters of the log": {"load_progress_state": lambda trainer, state: None},
}


@contextmanager
def replaced(methods):
    """Give LLaVATrainer other methods for a while."""
    own = {name: LLaVATrainer.__dict__.get(name) for name in methods}
    for name, method in methods.items():
        setattr(LLaVATrainer, name, method)
    try:
        yield
    finally:
        for name, method in own.items():
            delattr(LLaVATrainer, name) if method is None else setattr(LLaVATrainer, name, method)


def digests(model):
    """Return the SHA-256 of each weight that trains, complete on every rank, by name."""
    return {name: digest(weight) for name, weight in sorted(trained_state(model).items())}


def digest(weight):
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def optimizer_digest(trainer):
    """Return the SHA-256 of all that the optimizer of this rank holds: its weights, moments and steps."""
    optimizer, found = trainer.optimizer, hashlib.sha256()
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        found.update(repr(sorted((k, v) for k, v in group.items() if k != "params")).encode())
        for param in group["params"]:
            for _, value in [("", param.detach()), *sorted(optimizer.state[param].items())]:
                found.update((digest(value) if torch.is_tensor(value) else repr(value)).encode())
    return found.hexdigest()


def random_state_digest():
    """Return the SHA-256 of the random states that a step may draw from."""
    states = torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(random.getstate())
    return hashlib.sha256(repr(states).encode()).hexdigest()


def run(argv, **replacements):
    """Train once; return weights, optimizer, random state, log, and the samples of each step."""
    samples, step = [], LLaVATrainer.training_step

    def noting_step(trainer, model, inputs, *args, **kwargs):
        samples.append([trainer.state.global_step, list(inputs["sample_ids"])])
        return step(trainer, model, inputs, *args, **kwargs)

    # A run begins in a new process: nothing may hang on the random state that the last one left.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7777)
    with replaced({"training_step": noting_step, **replacements}):
        trainer = train(argv)
    log = [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in trainer.state.log_history]
    states = {"optimizer": optimizer_digest(trainer), "random state": random_state_digest()}
    return {"weights": digests(trainer.model), "log": log, "samples": samples, **states}


def fill_disk(argv, output, full_rank):
    """Train with a disk that is full for one rank from step 6 on; return the error of this rank and what is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hf = LLaVATrainer._save_checkpoint

    def save(trainer, *args, **kwargs):
        if trainer.state.global_step > 6 and full_rank == RANK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            hf(trainer, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        with replaced({"_save_checkpoint": save}):
            train([*argv, "--output_dir", output])
    except SaveError as error:
        left = sorted(path.name for path in Path(output).glob("*checkpoint-*"))
        return {"error": str(error), "left": left, "newest": newest_complete_checkpoint(output)}


def run_case(argv, output, resume_from=(), more=(), broken=(), full_disk_on=None):
    """Run a case and return its results by name."""
    if full_disk_on is not None:
        return {"full disk": fill_disk(argv, output, full_disk_on)}
    results = {"full": run([*argv, "--output_dir", f"{output}/full"])}
    for step in resume_from:
        for guard in (None, *broken):
            again, name = f"{output}/from_{step}", f"{step} without {guard}" if guard else str(step)
            flags = ["--output_dir", again, "--resume_from_checkpoint", f"{output}/full/checkpoint-{step}"]
            results[name] = run([*argv, *flags, *more], **BREAKS.get(guard, {}))
            if RANK == 0:
                shutil.rmtree(again)
    return results


def main(run_case):
    """Run every case of the file that the command line names, and write the results of this rank."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cases_file, results_file = words
    cases = json.loads(Path(cases_file).read_text())
    results = {name: run_case(**case) for name, case in cases.items()}
    Path(results_file.replace("RANK", str(RANK))).write_text(json.dumps(results))


if __name__ == "__main__":
    main(run_case)
