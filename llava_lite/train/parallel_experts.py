"""Send the tokens of one rank to the experts they chose, wherever those live, and bring the answers back.

GShard (Lepikhin et al. 2020, arXiv 2006.16668), section 3.2, without its capacity: every row travels, and how many go
where is told first. The router, the mask of padding and the balance loss stay where they were, in MoeBlock.

Shapes: `S` tokens of this rank, `K` choices a token, `N` rows that arrive here, `R` ranks that share the experts of a
layer, `E` experts of the layer, `D` model width, `I` width of an expert.
"""

import torch
import torch.distributed as dist
from torch import nn

from llava_lite.model.experts import Experts

# DeepSpeed's AutoEP keeps the experts of a rank under these names, and its checkpoints ask for them.
SHARES = ("w1", "w2", "w3")


class Exchange(torch.autograd.Function):
    """Send rows [sum(sent), D] to the ranks of a group, in rank order; gradients travel the other way."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        """Return the rows [sum(received), D] that the ranks sent here, in rank order."""
        ctx.counts = sent, received, group
        return exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of the rows that were sent."""
        sent, received, group = ctx.counts
        return exchanged(grad, received, sent, group), None, None, None


def exchanged(rows, sent, received, group):
    """Return what the ranks of `group` sent here; sent, received: number of rows for each of them."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def share(weight, rank, num_ranks):
    """Return a copy of the experts [E / R, ...] of a weight [E, ...] that a rank holds, in order."""
    return weight.detach().chunk(num_ranks)[rank].clone()


def split_weights(gate_up_proj, down_proj, rank, num_ranks):
    """Return what a rank holds of fused weights [E, 2I, D] and [E, D, I], by AutoEP's names: gate, down, up."""
    gate, up = share(gate_up_proj, rank, num_ranks).chunk(2, dim=1)
    return {"w1": gate.contiguous(), "w2": share(down_proj, rank, num_ranks), "w3": up.contiguous()}


def join_weights(shares):
    """Return the fused weights of all experts from the shares of all ranks: the way back from `split_weights`."""
    w1, w2, w3 = (torch.cat([held[name] for held in shares]) for name in SHARES)
    return {"gate_up_proj": torch.cat([w1, w3], dim=1), "down_proj": w2}


class ParallelExperts(Experts):
    """The experts of a layer, 1 / R of them here. Made of whole ones by `take_share`, with no constructor of its own.

    All ranks of the group must call it equally often, forward and backward.
    """

    fused: torch.Tensor | None = None

    def take_share(self, group):
        """Keep this rank's experts; `group`: the ranks that share the layer. The weights must be whole."""
        self.group = group
        self.num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        whole = {name: self._parameters.pop(name) for name in ("gate_up_proj", "down_proj")}
        trains = {name: weight.requires_grad for name, weight in whole.items()}
        for name, weight in split_weights(**whole, rank=rank, num_ranks=self.num_ranks).items():
            fused = "down_proj" if name == "w2" else "gate_up_proj"
            self.register_parameter(name, nn.Parameter(weight, requires_grad=trains[fused]))
        # Of whoever multiplies here: that are the experts of this rank.
        self.num_experts //= self.num_ranks

    @property
    def gate_up_proj(self):
        """The first weights [E / R, 2I, D] of the experts here, as the experts interface reads them, in a forward."""
        return self.fused

    @property
    def down_proj(self):
        """The second weights [E / R, D, I]."""
        return self.w2

    def forward(self, tokens, experts, weights):
        """Return the weighted sum of the chosen experts' outputs [S, D], as whole experts would.

        tokens: [S, D]; experts, weights: [S, K], counted over all experts of the layer.
        """
        num_choices = experts.shape[1]
        chosen = experts.flatten()  # [S * K]
        order = chosen.argsort(stable=True)
        # Not bincount, which waits for the device to learn the largest.
        sent = chosen.new_zeros(self.num_ranks * self.num_experts)
        sent = sent.scatter_add(0, chosen, torch.ones_like(chosen))  # [E]
        even = [self.num_experts] * self.num_ranks
        received = exchanged(sent, even, even, self.group)  # [R * E / R]
        # The one wait for the device.
        to, back = torch.stack([sent, received]).view(2, self.num_ranks, -1).sum(dim=2).tolist()
        rows = tokens.index_select(0, order // num_choices)  # [S * K, D]
        rows = Exchange.apply(rows, to, back, self.group)  # [N, D]
        here = torch.arange(self.num_experts, device=tokens.device).repeat(self.num_ranks)
        here = here.repeat_interleave(received, output_size=len(rows)).unsqueeze(1)  # [N, 1]
        # Once: whoever multiplies may ask for it more often.
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

    def all_shares(self, keep):
        """Return the fused weights of all experts on the CPU if `keep`, else {}; all ranks of the group must call it.

        Under ZeRO-3 the weights of this rank must be gathered.
        """
        held = [{} for _ in range(self.num_ranks)]
        for name in SHARES:
            weight = getattr(self, name).detach().contiguous()
            copies = [torch.empty_like(weight) for _ in held]
            dist.all_gather(copies, weight, group=self.group)
            for rank, copy in enumerate(copies if keep else ()):
                held[rank][name] = copy.cpu()
        return join_weights(held) if keep else {}
