"""One rank: upcycle a dense model partitioned by ZeRO-3 and take one step; print how far it is from one process.

Run by test_upcycle.py through torchrun, with the path of a dense model and of a JSON file for the results.
"""

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from llava_lite.checkpoints.copying import full_state_dict, gathered
from llava_lite.model.moe.block import RoutingContext, use_routing
from llava_lite.model.moe.upcycle import upcycle

CASES = {
    "all trained": {},
    "residual": {"use_residual": True},
    "all before the experts frozen": {"frozen": True},
    "checkpointing": {"checkpointing": True},
}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    # DeepSpeed clips at 1 by default.
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "leaf_module": {"classes": ["MoeBlock"]},
    },
}


def prepare(model, case):
    """Upcycle `model`, make its experts differ, and choose what trains."""
    upcycle(model, {"num_experts": [3, 4], "moe_mode": "dense", "use_residual": case.get("use_residual", False)})
    upcycled = full_state_dict(model)
    for name, param in model.named_parameters():
        if ".experts." in name:
            with torch.no_grad(), gathered([param], modify=True):
                noise = torch.randn(tuple(param.shape), generator=torch.Generator().manual_seed(len(name)))
                param.add_(noise * 0.05)
        if case.get("frozen"):
            param.requires_grad_(".mlp." in name)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return upcycled


def loss_of(model, forward, ids):
    """Return the cross-entropy and a tenth of the balance losses of one batch."""
    context = RoutingContext(training=True)
    with use_routing(context):
        loss = forward(input_ids=ids, labels=ids).loss
    return loss + 0.1 * sum(context.balance_losses())


def distance(ours, expected):
    """Return the largest difference of two state dicts."""
    return max((ours[name] - tensor).abs().max().item() for name, tensor in expected.items())


def run(case, path):
    """Return the distances after upcycling and after one step of plain gradient descent."""
    batches = [torch.arange(length).unsqueeze(0) % 40 for length in (9, 5)]
    # The plain model is loaded before the settings below make every model partitioned.
    plain = LlamaForCausalLM.from_pretrained(path)
    settings = HfDeepSpeedConfig(SETTINGS)
    model = LlamaForCausalLM.from_pretrained(path)
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    upcycled, expected = prepare(model, case), prepare(plain, case)
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=SETTINGS, optimizer=torch.optim.SGD(trained, lr=0.5))
    engine.backward(loss_of(model, engine, batches[dist.get_rank()]))
    engine.step()
    for ids in batches:
        (loss_of(plain, plain, ids) / 2).backward()
    torch.optim.SGD([param for param in plain.parameters() if param.requires_grad], lr=0.5).step()
    after = full_state_dict(model)
    del settings
    return {"upcycled": distance(upcycled, expected), "stepped": distance(after, plain.state_dict())}


def main():
    """Run all cases on this rank; rank 0 writes them."""
    path, out = sys.argv[1:]
    deepspeed.init_distributed("gloo")
    results = {name: run(case, path) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
