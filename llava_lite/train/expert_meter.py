"""Add up, over micro-batches and ranks, what the MoE layers did between two lines of the log."""

import torch


class ExpertMeter:
    """Expert load, dropped choices and balance loss of each MoE layer; nothing is read from the device until asked."""

    def __init__(self):
        self.reset()

    def reset(self):
        """Start counting anew."""
        self.sums: dict[int, torch.Tensor] = {}  # layer -> [E + 3]: load, dropped, balance loss, micro-batches

    def add(self, routing):
        """Add the RoutingContext of a forward pass."""
        losses = routing.balance_losses()
        for (layer, (load, dropped, _)), loss in zip(routing.counts().items(), losses, strict=True):
            row = torch.cat(
                [load.float(), torch.stack([dropped.float(), loss.detach().float(), torch.ones_like(loss)])]
            )
            self.sums[layer] = self.sums[layer] + row if layer in self.sums else row

    def read(self, add_over_ranks):
        """Return {layer: {"load", "dead", "dropped", "balance_loss"}} of all ranks, and start anew.

        load: list [E], shares of all choices before dropping. dead: experts that nobody chose. dropped: share of the
        choices. balance_loss: mean over micro-batches, 1 when balanced. add_over_ranks: tensor -> its sum over ranks.
        """
        reports = {layer: report(add_over_ranks(row)) for layer, row in sorted(self.sums.items())}
        self.reset()
        return reports


def report(row):
    """Return what a summed row [E + 3] of one layer says."""
    *load, dropped, balance_loss, num_batches = row.tolist()
    num_choices = max(sum(load), 1.0)
    return {
        "load": [round(share / num_choices, 6) for share in load],
        "dead": sum(share == 0 for share in load),
        "dropped": dropped / num_choices,
        "balance_loss": balance_loss / num_batches,
    }


def flat_report(reports):
    """Return the reports as single numbers under names that TensorBoard and W&B group by layer."""
    flat = {}
    for layer, values in reports.items():
        for expert, share in enumerate(values["load"]):
            flat[f"moe_layer_{layer}/load_{expert}"] = share
        for key in ("dead", "dropped", "balance_loss"):
            flat[f"moe_layer_{layer}/{key}"] = values[key]
    return flat
