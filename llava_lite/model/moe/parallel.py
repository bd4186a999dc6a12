"""Expert parallelism: send the tokens of a rank to the ranks that hold their experts, and return the outputs.

GShard (Lepikhin et al. 2020, arXiv 2006.16668), section 3.2, without its capacity: every row is sent, after the ranks
have exchanged the number of rows. Router, padding mask and balance loss stay in MoeBlock.

Shapes: `S` tokens of this rank, `K` experts of a token, `N` rows received here, `R` ranks among which the experts of a
layer are split, `E` experts of the layer, `D` model width, `I` width of an expert.
"""

import torch
import torch.distributed as dist
from torch import nn

from llava_lite.model.moe.experts import Experts

# Names of a rank's expert weights (gate, down, up), those of DeepSpeed's AutoEP and of its checkpoints.
SHARDS = ("w1", "w2", "w3")


class Exchange(torch.autograd.Function):
    """Send rows [sum(sent), D] to the ranks of a group, in rank order; gradients are sent back."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        """Return the rows [sum(received), D] that the ranks sent here, in rank order."""
        ctx.counts = sent, received, group
        return exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of the sent rows."""
        sent, received, group = ctx.counts
        return exchanged(grad, received, sent, group), None, None, None


def exchanged(rows, sent, received, group):
    """Return the rows that the ranks of `group` sent here; sent, received: number of rows for each of them."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def take_shard(weight, rank, num_ranks):
    """Return a copy of the shard [E / R, ...] of a weight [E, ...] that a rank holds, in order."""
    return weight.detach().chunk(num_ranks)[rank].clone()


def split_weights(gate_up_proj, down_proj, rank, num_ranks):
    """Return a rank's shards of fused weights [E, 2I, D] and [E, D, I], by the names of SHARDS."""
    gate, up = take_shard(gate_up_proj, rank, num_ranks).chunk(2, dim=1)
    return {"w1": gate.contiguous(), "w2": take_shard(down_proj, rank, num_ranks), "w3": up.contiguous()}


def join_weights(shards):
    """Return the fused weights of all experts from the shards of all ranks; the inverse of `split_weights`."""
    w1, w2, w3 = (torch.cat([held[name] for held in shards]) for name in SHARDS)
    return {"gate_up_proj": torch.cat([w1, w3], dim=1), "down_proj": w2}


class ParallelExperts(Experts):
    """The experts of a layer, 1 / R of them on this rank; all ranks of the group must call it equally often.

    experts: all experts of the layer, which it replaces; their weights must be gathered. group: the ranks that split
    them.
    """

    fused: torch.Tensor | None = None

    def __init__(self, experts: Experts, group):
        super().__init__(experts.config, experts.num_experts, experts.shape)
        self.multiply_like(experts)
        self.group = group
        self.num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        fused = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
        for name, weight in split_weights(**fused, rank=rank, num_ranks=self.num_ranks).items():
            trains = fused["down_proj" if name == "w2" else "gate_up_proj"].requires_grad
            self.register_parameter(name, nn.Parameter(weight, requires_grad=trains))
        # From here on the experts of this rank only.
        self.num_experts //= self.num_ranks
        self.train(experts.training)

    def add_weights(self, dtype, device):
        """Register nothing: the weights are shards of the experts that this module replaces."""

    @property
    def gate_up_proj(self):
        """The first weights [E / R, 2I, D] of this rank's experts, which exist during a forward call."""
        return self.fused

    @property
    def down_proj(self):
        """The second weights [E / R, D, I]."""
        return self.w2

    def forward(self, tokens, experts, weights):
        """Return the weighted sum of the assigned experts' outputs [S, D], as with all experts on this rank.

        tokens: [S, D]; experts, weights: [S, K], indices over all experts of the layer.
        """
        assigned = experts.flatten()  # [S * K]
        order = assigned.argsort(stable=True)
        # Not bincount, which waits for the device to read the maximum.
        sent = assigned.new_zeros(self.num_ranks * self.num_experts)
        sent = sent.scatter_add(0, assigned, torch.ones_like(assigned))  # [E]
        even = [self.num_experts] * self.num_ranks
        received = exchanged(sent, even, even, self.group)  # [R * E / R]
        # The only wait for the device.
        to, back = torch.stack([sent, received]).view(2, self.num_ranks, -1).sum(dim=2).tolist()
        rows = tokens.index_select(0, order // experts.shape[1])  # [S * K, D]
        rows = Exchange.apply(rows, to, back, self.group)  # [N, D]
        here = torch.arange(self.num_experts, device=tokens.device).repeat(self.num_ranks)
        here = here.repeat_interleave(received, output_size=len(rows)).unsqueeze(1)  # [N, 1]
        # Concatenated once; the experts' function may read the property several times.
        self.fused = torch.cat([self.w1, self.w3], dim=1)
        try:
            out = super().forward(rows, here, torch.ones_like(here, dtype=weights.dtype))
        finally:
            self.fused = None
        out = Exchange.apply(out, back, to, self.group)
        # A gather by the inverse order and a sum, since adding by index is not deterministic on CUDA.
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        out = out.index_select(0, places).view(*experts.shape, out.shape[1])  # [S, K, D]
        return (out * weights.unsqueeze(2)).sum(dim=1).to(tokens.dtype)

    def all_shards(self, keep):
        """Return the fused weights of all experts on the CPU if `keep`, else {}; all ranks of the group must call it.

        Under ZeRO-3 this rank's weights must be gathered.
        """
        held = [{} for _ in range(self.num_ranks)]
        for name in SHARDS:
            weight = getattr(self, name).detach().contiguous()
            copies = [torch.empty_like(weight) for _ in held]
            dist.all_gather(copies, weight, group=self.group)
            for rank, copy in enumerate(copies if keep else ()):
                held[rank][name] = copy.cpu()
        return join_weights(held) if keep else {}
