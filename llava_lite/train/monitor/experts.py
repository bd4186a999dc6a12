"""Sum expert load and balance loss of the MoE layers over micro-batches and ranks, between two lines of the log."""

import torch


class ExpertMeter:
    """Expert load, dropped assignments and balance loss of each MoE layer; read from the device only by `read`."""

    def __init__(self):
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
        """Return {layer: {"load", "dead", "dropped", "balance_loss"}} of all ranks, and start from zero.

        load: list [E], fractions of all assignments before dropping. dead: experts without a token. dropped: fraction
        of the assignments. balance_loss: mean over micro-batches, 1 when balanced. add_over_ranks: tensor -> its sum
        over ranks.
        """
        sums, self.sums = self.sums, {}
        return {layer: report(add_over_ranks(row)) for layer, row in sorted(sums.items())}


def report(row):
    """Return the report of one layer from its sums [E + 3]."""
    *load, dropped, balance_loss, num_batches = row.tolist()
    num_assignments = max(sum(load), 1.0)
    return {
        "load": [round(count / num_assignments, 6) for count in load],
        "dead": sum(count == 0 for count in load),
        "dropped": dropped / num_assignments,
        "balance_loss": balance_loss / num_batches,
    }


def flat_report(reports):
    """Return the reports as single numbers under names that TensorBoard and W&B group by layer."""
    flat = {}
    for layer, values in reports.items():
        for expert, fraction in enumerate(values["load"]):
            flat[f"moe_layer_{layer}/load_{expert}"] = fraction
        for key in ("dead", "dropped", "balance_loss"):
            flat[f"moe_layer_{layer}/{key}"] = values[key]
    return flat
