"""One rank: open folders partitioned by ZeRO-3 and print how far their weights are from those of a plain opening.

Run by test_partial.py through torchrun, with a file for the results and the folders; "extra" must be refused.
"""

import json
import sys

import deepspeed
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.weights import full_state_dict

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def distance(folder, plain):
    """Return the largest difference of any weight from `plain`, or what was said instead."""
    try:
        model = LlavaLlamaForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    # A table that has grown is whole until DeepSpeed's engine takes it.
    assert sum(not hasattr(param, "ds_id") for param in model.parameters()) <= 2
    found = full_state_dict(model)
    assert found.keys() == plain.keys()
    return max((found[name].float() - weight.float()).abs().max().item() for name, weight in plain.items())


def main():
    """Open all folders on this rank; rank 0 writes what came out."""
    out, *folders = sys.argv[1:]
    plain = {
        folder: None if "extra" in folder else LlavaLlamaForCausalLM.from_pretrained(folder).state_dict()
        for folder in folders
    }
    deepspeed.init_distributed("gloo")
    settings = HfDeepSpeedConfig(SETTINGS)
    results = {folder: distance(folder, state) for folder, state in plain.items()}
    del settings
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
