"""Turn the experts that tokens chose into groups of rows, and multiply a group by the weights of its experts.

Where the host knows how many rows each expert has (the CPU), a group is one expert's, and its rows stay in the
processor's cache from one step to the next. On CUDA the host never learns it: one group holds all experts' rows in
their order, and grouped products read the offsets on the device.

Shapes: `S` tokens, `K` choices a token, `R` rows of a group, `E` experts; a weight [E, N, M] turns M numbers into N.
"""

import torch

from .products import product, unlearned, weight_gradient

# Public since torch 2.10.
_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def can_group(device, dtype, widths):
    """Return whether grouped products can read rows of these widths; else experts must run one by one."""
    if device.type != "cuda" or _grouped_mm is None or any(width * dtype.itemsize % 16 for width in widths):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def group_choices(experts, num_experts, all_at_once):
    """Return the groups of the choices [S, K]: one of all experts, or one of each that was chosen; none of none."""
    if not experts.numel():
        return []
    if all_at_once:
        return [AllExperts(experts, num_experts)]
    choices = experts.flatten().argsort(stable=True)  # [S * K]
    counts = experts.flatten().bincount(minlength=num_experts).tolist()
    return [
        OneExpert(expert, of_expert, experts.shape[1])
        for expert, of_expert in enumerate(choices.split(counts))
        if len(of_expert)
    ]


def empty_gradient(param, groups):
    """Return room for the gradient of a parameter [E, ...]: unwritten where a group will write, else zero."""
    grad = torch.empty_like(param)
    covered = {expert for group in groups for expert in group.covered}
    for expert in set(range(len(param))) - covered:
        grad[expert].zero_()
    return grad


class OneExpert:
    """The choices of one expert."""

    def __init__(self, expert, choices, num_choices):
        """expert: its number. choices: [R], each token * K + rank. num_choices: K."""
        self.expert = expert
        self.covered = range(expert, expert + 1)
        self.choices = choices
        self.tokens = choices // num_choices  # [R]

    def product(self, rows, weight, bias=None):
        """Return the outputs [R, N] of inputs [R, M]."""
        return unlearned(rows, weight[self.expert], None if bias is None else bias[self.expert])

    def product_back(self, grad, weight):
        """Return the gradient of the inputs [R, M] from that of the outputs [R, N]."""
        return product(grad, weight[self.expert].t())

    def weight_gradient(self, grad, rows, into):
        """Write the part of the gradient [E, N, M] of the group's experts, from that of outputs and from inputs."""
        weight_gradient(grad, rows, out=into[self.expert])

    def bias_gradient(self, grad, into):
        """Write the part of the gradient [E, N] of the group's experts."""
        torch.sum(grad, dim=0, out=into[self.expert])

    def dot_bias(self, rows, bias):
        """Return the dot product [R] of each row with the bias of its expert."""
        return rows @ bias[self.expert]

    def add_to(self, sums, rows, weights=None):
        """Add rows [R, D], times their choice's weight of [S, K], to those of their tokens in sums [S, D]."""
        if weights is not None:
            rows = rows * weights.flatten()[self.choices, None]
        sums.index_add_(0, self.tokens, rows.to(sums.dtype))


class AllExperts:
    """The choices of all experts, in the experts' order; how many are whose, the device alone knows."""

    def __init__(self, experts, num_experts):
        """experts: [S, K]."""
        self.covered = range(num_experts)
        self.shape = experts.shape
        self.expert_of_row, self.choices = experts.flatten().sort(stable=True)
        self.tokens = self.choices // experts.shape[1]  # [S * K]
        numbers = torch.arange(num_experts, device=experts.device)
        self.ends = torch.searchsorted(self.expert_of_row, numbers, right=True, out_int32=True)  # [E]
        self.is_of = self.expert_of_row == numbers[:, None]  # [E, S * K]

    def product(self, rows, weight, bias=None):
        """Return the outputs [R, N] of inputs [R, M]."""
        out = _grouped_mm(rows, weight.transpose(1, 2), offs=self.ends)
        return out if bias is None else out.add_(bias[self.expert_of_row])

    def product_back(self, grad, weight):
        """Return the gradient of the inputs [R, M] from that of the outputs [R, N]."""
        return _grouped_mm(grad, weight, offs=self.ends)

    def weight_gradient(self, grad, rows, into):
        """Write the gradient [E, N, M], from that of outputs and from inputs."""
        into.copy_(_grouped_mm(grad.t(), rows, offs=self.ends))
        # Some kernels write nothing where an expert has no rows (pytorch issue 172439).
        into.masked_fill_(~self.is_of.any(dim=1)[:, None, None], 0)

    def bias_gradient(self, grad, into):
        """Write the gradient [E, N]."""
        # A product: an index_add adds in another order each time on CUDA.
        torch.mm(self.is_of.to(grad.dtype), grad, out=into)

    def dot_bias(self, rows, bias):
        """Return the dot product [R] of each row with the bias of its expert."""
        return (rows @ bias.t()).gather(1, self.expert_of_row[:, None]).squeeze(1)

    def add_to(self, sums, rows, weights=None):
        """Add rows [R, D], times their choice's weight of [S, K], to those of their tokens in sums [S, D]."""
        places = torch.empty_like(self.choices)
        places[self.choices] = torch.arange(len(places), device=places.device)
        # One choice after the other; all at once would be a tensor [S, K, D].
        for k, of_rank in enumerate(places.view(self.shape).unbind(1)):
            row = rows.index_select(0, of_rank)
            sums.add_(row) if weights is None else sums.addcmul_(row, weights[:, k : k + 1])
