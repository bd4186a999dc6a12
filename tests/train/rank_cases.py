"""Train toy stages on this rank and write what it saw: `rank_cases.py CASES.json RESULTS_DIRECTORY`.

Started by test_ranks.py with a launcher; one start runs many cases. A case: "name", "argv", "nan_on_rank".
"""

import json
import os
import sys
from pathlib import Path

from llava_lite.model.llava_arch import LlavaMetaForCausalLM
from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.train import train

RANK = int(os.environ["RANK"])


def run(case):
    """Return the losses of a case, or the error that ended it."""
    hf = LlavaMetaForCausalLM.supervised_loss
    if case.get("nan_on_rank") == RANK:
        LlavaMetaForCausalLM.supervised_loss = lambda self, *args: hf(self, *args) * float("nan")
    step, samples = LLaVATrainer.training_step, []

    def noting_step(trainer, model, inputs, *args, **kwargs):
        samples.append((trainer.state.global_step, list(inputs["sample_ids"])))
        return step(trainer, model, inputs, *args, **kwargs)

    LLaVATrainer.training_step = noting_step
    try:
        log = train(case["argv"]).state.log_history
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        LlavaMetaForCausalLM.supervised_loss, LLaVATrainer.training_step = hf, step
    keys = ("loss", "lm_loss", "eval_loss", "grad_norm", "tokens")
    return {key: [line[key] for line in log if key in line] for key in keys} | {"samples": samples}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        path = Path(sys.argv[2]) / f"{case['name']}_{RANK}.json"
        path.write_text(json.dumps(run(case)))
