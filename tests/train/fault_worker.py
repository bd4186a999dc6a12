"""Train with a fault: `fault_worker.py FAULT FLAGS...`; started by test_hangs.py and test_non_finite.py.

The faults: rank_hangs, of rank 1 in the forward pass of step 2; backward_hangs, in its backward pass; answers_hangs,
evaluation_hangs and save_hangs, in the evaluation or the checkpoint before it. worker_hangs, worker_dies: of the
loader worker that reads toy_005. bad_loss: of rank 1 in step 2. bad_update: of the optimizer's state of rank 1 in
step 2.
"""

import os
import signal
import sys
import time

from llava_lite.data.dataset import LazySupervisedDataset
from llava_lite.model.llava_arch import LlavaMetaForCausalLM
from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.saving.writer import CheckpointWriter
from llava_lite.train.train import main


def add_fault(owner, name, fault):
    """Call `fault` with the arguments of a method before the method itself."""
    theirs = getattr(owner, name)

    def method(*args, **kwargs):
        fault(*args)
        return theirs(*args, **kwargs)

    setattr(owner, name, method)


def is_struck(trainer):
    return trainer.state.global_step == 1 and os.environ.get("RANK") == "1"


def hang_in_step(trainer, *args):
    if is_struck(trainer):
        time.sleep(10_000)


def hang_in_backward(trainer, *args):
    if is_struck(trainer):
        layer = next(module for name, module in trainer.unwrapped.named_modules() if name.endswith("layers.0"))
        layer.register_forward_hook(hang_at_gradient)


def hang_at_gradient(module, inputs, output):
    output = output[0] if isinstance(output, tuple) else output
    output.register_hook(lambda gradient: time.sleep(10_000))


def hang_in_worker(dataset, record, image):
    if record.id == "toy_005":
        time.sleep(10_000)


def die_in_worker(dataset, record, image):
    if record.id == "toy_005":
        os.kill(os.getpid(), signal.SIGKILL)


def with_bad_loss(compute_loss):
    """Return a compute_loss in which the cross-entropy is NaN."""

    def method(trainer, *args, **kwargs):
        theirs = LlavaMetaForCausalLM.supervised_loss
        if is_struck(trainer):
            LlavaMetaForCausalLM.supervised_loss = lambda self, *given: theirs(self, *given) * float("nan")
        try:
            return compute_loss(trainer, *args, **kwargs)
        finally:
            LlavaMetaForCausalLM.supervised_loss = theirs

    return method


def break_update(trainer, *args):
    # The step is counted by then.
    if trainer.state.global_step == 2 and os.environ.get("RANK") == "1":
        values = next(values for values in trainer.optimizer.state.values() if "exp_avg" in values)
        values["exp_avg"].view(-1)[0] = float("inf")


if __name__ == "__main__":
    fault, *flags = sys.argv[1:]
    if fault == "rank_hangs":
        add_fault(LLaVATrainer, "compute_loss", hang_in_step)
    if fault == "answers_hangs":
        add_fault(LLaVATrainer, "answer_examples", hang_in_step)
    if fault == "evaluation_hangs":
        add_fault(LLaVATrainer, "hide_repeats", hang_in_step)
    if fault == "backward_hangs":
        add_fault(LLaVATrainer, "compute_loss", hang_in_backward)
    if fault == "save_hangs":
        add_fault(CheckpointWriter, "write_state", lambda writer, *args: hang_in_step(writer.trainer))
    if fault == "worker_hangs":
        # Where an image is looked for: after the note of what is read.
        add_fault(LazySupervisedDataset, "image_path", hang_in_worker)
    if fault == "worker_dies":
        add_fault(LazySupervisedDataset, "image_path", die_in_worker)
    if fault == "bad_loss":
        LLaVATrainer.compute_loss = with_bad_loss(LLaVATrainer.compute_loss)
    if fault == "bad_update":
        # Between the update and the look at it.
        add_fault(LLaVATrainer, "has_bad_update", break_update)
    main(flags)
