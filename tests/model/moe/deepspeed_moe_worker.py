"""One process: run DeepSpeed's MoE layers, and a Llama that holds some, and write what they computed.

Run by test_deepspeed_moe.py with the path of the results. Nothing of llava_lite is used here, so that the results are
an independent statement of what MoE-LLaVA computes: DeepSpeed's layers in place of `layer.mlp`, their losses summed.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
CONFIGS = {"llama": (LlamaConfig(**SHAPE), LlamaMLP), "phi": (PhiConfig(**SHAPE), PhiMLP)}
# What MoE-LLaVA gives DeepSpeed, by the keys of config.moe.
CASES = {
    f"{kind} top-{top_k} {factor} {min_capacity}{' residual' if residual else ''}": {
        "kind": kind,
        "top_k_experts": top_k,
        "capacity_factor": factor,
        "eval_capacity_factor": 2 * factor,
        "min_capacity": min_capacity,
        "use_residual": residual,
    }
    for kind, residual in (("llama", False), ("llama", True), ("phi", False))
    for top_k in (1, 2, 3)
    for factor, min_capacity in ((0.5, 0), (1.5, 0), (0.25, 6), (4.0, 0))
}
MODEL = {
    "num_experts": 4,
    "moe_mode": "sparse",
    "top_k_experts": 2,
    "capacity_factor": 0.75,
    "eval_capacity_factor": 1.0,
    "router_aux_loss_coef": 0.05,
}


def deepspeed_layer(case, expert, hidden_size):
    """Return DeepSpeed's layer, without the noise that would make two runs differ."""
    from deepspeed.moe.layer import MoE

    layer = MoE(
        hidden_size,
        expert,
        num_experts=4,
        ep_size=1,
        k=case["top_k_experts"],
        capacity_factor=case["capacity_factor"],
        eval_capacity_factor=case["eval_capacity_factor"],
        min_capacity=case.get("min_capacity", 0),
        use_residual=case.get("use_residual", False),
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    return layer


def run_layer(case):
    """Return the weights of a layer, its input and, in training and not, output, loss and gradients."""
    torch.manual_seed(0)
    config, mlp_class = CONFIGS[case["kind"]]
    layer = deepspeed_layer(case, mlp_class(config), SHAPE["hidden_size"])
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(std=0.4)
    hidden = torch.randn(2, 13, SHAPE["hidden_size"], requires_grad=True)
    result = {"weights": dict(layer.state_dict()), "hidden": hidden.detach()}
    for mode in ("train", "eval"):
        layer.train(mode == "train").zero_grad()
        hidden.grad = None
        output, loss, _ = layer(hidden)
        (output.square().sum() + loss).backward()
        grads = {name: param.grad for name, param in layer.named_parameters()}
        result[mode] = {"output": output.detach(), "loss": loss.detach(), "hidden": hidden.grad, "grads": grads}
    return result


class KeepLoss(torch.nn.Module):
    """A layer that returns its output alone, as a decoder expects, and keeps its loss."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        """Return the output."""
        output, self.loss, _ = self.layer(hidden)
        return output


def run_model():
    """Return the weights of a Llama with experts and, for a batch unpadded and padded, logits, loss and gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).train()
    for layer in (model.model.layers[0], model.model.layers[2]):
        layer.mlp = KeepLoss(deepspeed_layer(MODEL, layer.mlp, config.hidden_size))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.3).add_(float("norm" in name))
    ids = torch.randint(3, 60, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[2, 10:] = 0
    # A padding token is an ordinary token to the router.
    result = {"weights": {name.replace(".mlp.layer.", ".mlp."): w for name, w in model.state_dict().items()}}
    for name, mask_of_case in (("unpadded", torch.ones_like(ids)), ("padded", mask)):
        model.zero_grad()
        labels = ids.masked_fill(mask_of_case == 0, -100)
        logits = model(ids * mask_of_case, attention_mask=mask_of_case, use_cache=False).logits
        lm_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        balance = sum(layer.mlp.loss for layer in model.model.layers if isinstance(layer.mlp, KeepLoss))
        loss = lm_loss + MODEL["router_aux_loss_coef"] * balance
        loss.backward()
        grads = {name.replace(".mlp.layer.", ".mlp."): param.grad for name, param in model.named_parameters()}
        result[name] = {"ids": ids * mask_of_case, "mask": mask_of_case, "labels": labels, "logits": logits.detach()}
        result[name] |= {"loss": loss.detach(), "balance": balance.detach(), "grads": grads}
    return result


def main(path):
    """Write the results of every case."""
    import deepspeed
    from deepspeed.utils import groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    groups._create_expert_and_data_parallel(1)
    torch.save({"layers": {name: run_layer(case) for name, case in CASES.items()}, "model": run_model()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
