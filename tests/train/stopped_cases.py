"""Stop toy stages by signals and resume them: `stopped_cases.py CASES.json RESULTS_RANK.json`.

Started by test_stopped.py on one rank or several; one start runs many cases. A case: "argv", "output" (a directory),
"stops": a list of {"signal", "step", "at", "rank"}; at: "step" (in it), a number (in this batch of the evaluation
after it), or "answer" (while an answer of it is generated). Rank None: all.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch
from resume_cases import NOT_COMPARED, RANK, digest, main, run

from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.monitor import evaluation
from llava_lite.train.saving.manifest import checkpoints_in

CLOCK = ("runtime", "per_second", *NOT_COMPARED)


class Sender:
    """Sends one signal to this process at a place of a run."""

    def __init__(self, stop):
        self.stop, self.batches, self.is_sent = stop, 0, False

    def send_at(self, trainer, at):
        """Send it once, if this is the place."""
        stop, step = self.stop, trainer.state.global_step + (at == "step")
        is_mine = stop["rank"] in (None, RANK)
        if self.is_sent or not is_mine or (at, step) != (stop["at"], stop["step"]):
            return
        self.is_sent = True
        os.kill(os.getpid(), signal.Signals[stop["signal"]])
        # Another thread takes it.
        time.sleep(0.2)


def stopped(argv, stop):
    """Train until a signal ends the run; return its code, its samples and what it was about to do."""
    sender, samples = Sender(stop), []
    step, predict, generate = LLaVATrainer.training_step, LLaVATrainer.prediction_step, evaluation.generate_answers
    trainers = []

    def training_step(trainer, model, inputs, *args, **kwargs):
        samples.append([trainer.state.global_step, list(inputs["sample_ids"])])
        sender.send_at(trainer, "step")
        return step(trainer, model, inputs, *args, **kwargs)

    def prediction_step(trainer, *args, **kwargs):
        trainers.append(trainer)
        sender.batches += trainer.state.global_step == stop["step"]
        sender.send_at(trainer, sender.batches)
        return predict(trainer, *args, **kwargs)

    def generate_answers(*args, **kwargs):
        sender.send_at(trainers[-1], "answer")
        return generate(*args, **kwargs)

    evaluation.generate_answers = generate_answers
    try:
        run(argv, training_step=training_step, prediction_step=prediction_step)
        return {"code": 0, "samples": samples}
    except SystemExit as end:
        return {"code": end.code, "samples": samples}
    finally:
        evaluation.generate_answers = generate


def finished(argv, directory):
    """Train to the end; return what two runs must have in common."""
    results = run(argv)
    state = json.loads((directory / "trainer_state.json").read_text())
    results |= {
        "log": without_clock(results["log"]),
        "random": digest(torch.get_rng_state()),
        "best": [state["best_metric"], state["best_global_step"], Path(state["best_model_checkpoint"] or "").name],
        "checkpoints": sorted(path.name for path in checkpoints_in(directory)),
        "weights file": digest(torch.frombuffer(read_weights(directory), dtype=torch.uint8)),
    }
    for name in ("metrics.jsonl", "generations.jsonl"):
        path = directory / name
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        results[name] = without_clock(lines)
    return results


def read_weights(directory):
    """Return the bytes of the weights of a final directory."""
    return bytearray((directory / "model.safetensors").read_bytes())


def without_clock(lines):
    """Return lines of a log without what depends on the time."""
    return [{k: v for k, v in line.items() if not k.endswith(CLOCK)} for line in lines]


def run_case(argv, output, stops):
    """Run one stage to its end, and stop and resume another one; return the results by name."""
    full, again = Path(output, "full"), Path(output, "again")
    results = {"full": finished([*argv, "--output_dir", str(full)], full), "stops": []}
    flags = [*argv, "--output_dir", str(again)]
    for stop in stops:
        results["stops"].append(stopped(flags, stop))
    results["again"] = finished(flags, again)
    return results


if __name__ == "__main__":
    main(run_case)
