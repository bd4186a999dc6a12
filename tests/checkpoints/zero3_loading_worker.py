"""One rank: open directories partitioned by ZeRO-3 and print how far their weights are from those of a plain opening.

Run by test_partial.py through torchrun, with a file for the results and the directories; "extra" must be refused.
"""

import json
import sys

import deepspeed
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from llava_lite.checkpoints.copying import full_state_dict
from llava_lite.model import LlavaLlamaForCausalLM

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def distance(directory, plain):
    """Return the largest difference of any weight from `plain`, or the message of the error instead."""
    try:
        model = LlavaLlamaForCausalLM.from_pretrained(directory)
    except ValueError as error:
        return str(error)
    # A matrix that has grown is complete until DeepSpeed's engine partitions it.
    assert sum(not hasattr(param, "ds_id") for param in model.parameters()) <= 2
    found = full_state_dict(model)
    assert found.keys() == plain.keys()
    return max((found[name].float() - weight.float()).abs().max().item() for name, weight in plain.items())


def main():
    """Open all directories on this rank; rank 0 writes what came out."""
    out, *directories = sys.argv[1:]
    plain = {
        directory: None if "extra" in directory else LlavaLlamaForCausalLM.from_pretrained(directory).state_dict()
        for directory in directories
    }
    deepspeed.init_distributed("gloo")
    settings = HfDeepSpeedConfig(SETTINGS)
    results = {directory: distance(directory, state) for directory, state in plain.items()}
    del settings
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
