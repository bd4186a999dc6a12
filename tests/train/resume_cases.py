"""Train toy stages, whole and resumed, and write what each run saw: `resume_cases.py cases.json results_RANK.json`.

Started by test_resume.py, alone or by a launcher on several ranks; one start runs many cases.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers.trainer_utils import set_seed

from llava_lite.train.checkpoint import CheckpointMixin
from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.train import train
from llava_lite.train.trained_weights import trained_state

SAMPLES_SEEN = []
# Depends on the clock.
NOT_COMPARED = {"tokens_per_s", "mfu", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
NOT_COMPARED |= {"total_flos"}


def watch_samples():
    """Note the ids of every micro-batch."""
    step = LLaVATrainer.training_step

    def noting_step(self, model, inputs, *args, **kwargs):
        SAMPLES_SEEN.append(list(inputs["sample_ids"]))
        return step(self, model, inputs, *args, **kwargs)

    LLaVATrainer.training_step = noting_step


# Each takes one guard of the resume out, to show that the comparison sees it.
BREAKS = {
    "random state": ("_load_rng_state", lambda self, checkpoint: None),
    "epoch of the sampler": ("_run_epoch", lambda self, *args, **kwargs: super(CheckpointMixin, self)._run_epoch(*args, **kwargs)),
}


def digest(model):
    """Return the SHA-256 of all weights that train, whole on every rank."""
    state = trained_state(model)
    return hashlib.sha256(b"".join(state[n].contiguous().view(torch.uint8).numpy().tobytes() for n in sorted(state))).hexdigest()


def run(argv, broken=None):
    """Train once; return weights, log and samples."""
    SAMPLES_SEEN.clear()
    # A run begins in a new process, so nothing may hang on the random state that the last one left.
    set_seed(7777)
    name, replacement = BREAKS[broken] if broken else ("_load_rng_state", LLaVATrainer._load_rng_state)
    own = LLaVATrainer.__dict__.get(name)
    setattr(LLaVATrainer, name, replacement)
    try:
        trainer = train(argv)
    finally:
        delattr(LLaVATrainer, name) if own is None else setattr(LLaVATrainer, name, own)
    log = [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in trainer.state.log_history]
    return {"weights": digest(trainer.model), "log": log, "samples": list(SAMPLES_SEEN), "step": trainer.state.global_step}


def main(cases_file, results_file):
    """Run every case and write the results of this rank."""
    watch_samples()
    results = {}
    for name, case in json.loads(Path(cases_file).read_text()).items():
        whole = f"{case['output']}/whole"
        results[name] = {"whole": run([*case["argv"], "--output_dir", whole])}
        for step in case["resume_from"]:
            for broken in [None, *case.get("broken", [])]:
                again = f"{case['output']}/from_{step}"
                flags = ["--output_dir", again, "--resume_from_checkpoint", f"{whole}/checkpoint-{step}"]
                results[name][f"{step} without {broken}" if broken else str(step)] = run([*case["argv"], *flags], broken)
                if os.environ.get("RANK", "0") == "0":
                    shutil.rmtree(again)
    Path(results_file.replace("RANK", os.environ.get("RANK", "0"))).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
