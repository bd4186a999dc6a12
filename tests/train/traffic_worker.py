"""Train a toy on several ranks and write what each sends and holds: `traffic_worker.py CASES.json RESULTS_RANK.json`.

Every collective of torch.distributed is counted as a ring sends it. A case: flags of a run.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
# Flags, counts and norms are no weights.
LEAST_NUMEL = 200
sent, calls = Counter(), Counter()


def nbytes(tensor):
    """Return the bytes of a tensor or of a list of them."""
    tensors = tensor if isinstance(tensor, (list, tuple)) else [tensor]
    return sum(t.numel() * t.element_size() for t in tensors)


# Which argument holds what is sent, and in which halves of a sum it is.
COLLECTIVES = {
    "all_reduce": ("tensor", 0, ("reduce", "gather")),
    "reduce": ("tensor", 0, ("reduce",)),
    "reduce_scatter_tensor": ("input", 1, ("reduce",)),
    "_reduce_scatter_base": ("input", 1, ("reduce",)),
    "reduce_scatter": ("input_list", 1, ("reduce",)),
    "all_gather_into_tensor": ("output_tensor", 0, ("gather",)),
    "_all_gather_base": ("output_tensor", 0, ("gather",)),
    "all_gather": ("tensor_list", 0, ("gather",)),
    "broadcast": ("tensor", 0, ("gather",)),
}


def counted(name, function):
    """Return the collective, counting what a rank sends."""
    word, place, halves = COLLECTIVES[name]

    def call(*args, **kwargs):
        tensor = kwargs[word] if word in kwargs else args[place]
        first = tensor[0] if isinstance(tensor, (list, tuple)) else tensor
        if first.is_floating_point() and first.numel() >= LEAST_NUMEL:
            calls[name] += 1
            fraction = (dist.get_world_size() - 1) / dist.get_world_size()
            for half in halves:
                sent[half] += nbytes(tensor) * fraction
        return function(*args, **kwargs)

    return call


def count_collectives():
    """Count from now on; before DeepSpeed takes hold of the functions."""
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, counted(name, getattr(dist, name)))


def held(trainer):
    """Return the bytes of this rank's weights, Adam's moments and float32 copies after a run."""
    engine = trainer.model_wrapped
    optimizer = engine.optimizer
    params = list(engine.module.parameters())
    # A small weight that ZeRO-3 never gives away is complete on every rank.
    parts = [p.ds_tensor if hasattr(p, "ds_tensor") and not p.ds_persist else p for p in params]
    moments = [state for states in optimizer.optimizer.state.values() for state in states.values()]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = optimizer.single_partition_of_fp32_groups if masters is None else masters
    return {
        "weights": nbytes(parts),
        "adam": nbytes([state for state in moments if torch.is_tensor(state) and state.numel() > 1]),
        "master": nbytes(masters),
        "persistent": sum(p.numel() for p in params if getattr(p, "ds_persist", False)),
    }


def main(cases_file, results_file):
    """Run every case for 2 and for 4 steps; the difference is that of 2 steps without what a start sends."""
    count_collectives()
    from llava_lite.train.estimate.scale import get_weights
    from llava_lite.train.train import prepare

    results = {}
    for name, argv in json.loads(Path(cases_file).read_text()).items():
        totals = []
        for num_steps in (2, 4):
            sent.clear()
            calls.clear()
            output = str(Path(results_file).with_name(f"{name}_{num_steps}"))
            stage = prepare([*argv, "--max_steps", str(num_steps), "--output_dir", output])
            weights = get_weights(stage.trainer.model)
            stage.trainer.train()
            totals.append(dict(sent))
        a_step = {half: (totals[1][half] - totals[0][half]) / 2 for half in totals[1]}
        results[name] = {"sent": a_step, "calls": dict(calls), "weights": weights, "held": held(stage.trainer)}
    Path(results_file.replace("RANK", str(RANK))).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
