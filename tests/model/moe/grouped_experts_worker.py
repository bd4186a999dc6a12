"""One rank: take one step with our experts function under ZeRO; write how far it is from one process and `eager`.

Run by test_grouped_experts.py through torchrun, with the path of a dense model and of a JSON file for the results.
"""

import copy
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).parent))

from zero3_upcycle_worker import SETTINGS, distance, loss_of, prepare

from llava_lite.checkpoints.copying import full_state_dict
from llava_lite.model.moe import experts

CASES = {
    f"ZeRO-{stage}, {name}": {"stage": stage, **case}
    for stage in (2, 3)
    for name, case in {
        "plain": {},
        "residual, checkpointing": {"use_residual": True, "checkpointing": True},
        "experts alone": {"frozen": True},
    }.items()
}


def count_calls():
    """Count from now on how often our function runs."""
    calls = []
    real = experts.ALL_EXPERTS_FUNCTIONS[experts.OWN]
    experts.ALL_EXPERTS_FUNCTIONS.register(experts.OWN, lambda *given: calls.append(1) or real(*given))
    return calls


def run(case, path, calls):
    """Return the distance after one step of plain gradient descent, and how often our function ran on this rank."""
    # Rank 1's only token leaves experts without routed tokens, and so without a part in the sum of gradients.
    batches = [torch.arange(9).unsqueeze(0), torch.tensor([[3, 3]])]
    plain = LlamaForCausalLM.from_pretrained(path)
    plain.config._experts_implementation = "eager"
    zero = SETTINGS["zero_optimization"] if case["stage"] == 3 else {"stage": case["stage"]}
    settings = copy.deepcopy(SETTINGS) | {"zero_optimization": zero}
    keep = HfDeepSpeedConfig(settings)
    model = LlamaForCausalLM.from_pretrained(path)
    model.config._experts_implementation = experts.OWN
    prepare(model, case)
    prepare(plain, case)
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=torch.optim.SGD(trained, lr=0.5))
    calls.clear()
    engine.backward(loss_of(model, engine, batches[dist.get_rank()]))
    ran = len(calls)
    engine.step()
    for ids in batches:
        (loss_of(plain, plain, ids) / 2).backward()
    torch.optim.SGD([param for param in plain.parameters() if param.requires_grad], lr=0.5).step()
    stepped = distance(full_state_dict(model), plain.state_dict())
    del keep
    return {"stepped": stepped, "calls": ran}


def main():
    """Run all cases on this rank; rank 0 writes them."""
    path, out = sys.argv[1:]
    deepspeed.init_distributed("gloo")
    calls = count_calls()
    results = {name: run(case, path, calls) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
