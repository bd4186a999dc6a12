"""Turn the experts that tokens are assigned to into groups of rows, and multiply a group by its experts' weights.

Where the host knows how many rows each expert has (the CPU), a group is one expert's, and its rows stay in the
processor's cache between the steps. On CUDA the host does not wait for these counts: one group holds the rows of all
experts in their order, and grouped products read the offsets on the device.

Shapes: `S` tokens, `K` experts of a token, `R` rows of a group, `E` experts; a weight [E, N, M] maps M inputs to N
outputs. An assignment is one of the S * K pairs of a token and one of its experts.
"""

import torch
from torch.nn import functional as F


def can_group(device, dtype, widths):
    """Return whether grouped products can read rows of these widths; else experts must run one by one."""
    if device.type != "cuda" or any(width * dtype.itemsize % 16 for width in widths):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def group_assignments(experts, num_experts, all_at_once, matmul):
    """Return the groups of the assignments [S, K]: one for all experts, or one for each expert that has tokens.

    matmul: the products of a group of one expert.
    """
    if not experts.numel():
        return []
    if all_at_once:
        return [AllExperts(experts, num_experts)]
    assignments = experts.flatten().argsort(stable=True)  # [S * K]
    counts = experts.flatten().bincount(minlength=num_experts).tolist()
    return [
        OneExpert(expert, of_expert, experts.shape[1], matmul)
        for expert, of_expert in enumerate(assignments.split(counts))
        if len(of_expert)
    ]


def empty_gradient(param, groups):
    """Return a tensor for the gradient of a parameter [E, ...]: uninitialised where a group will write, else zero."""
    grad = torch.empty_like(param)
    covered = {expert for group in groups for expert in group.covered}
    for expert in set(range(len(param))) - covered:
        grad[expert].zero_()
    return grad


class OneExpert:
    """The assignments to one expert."""

    def __init__(self, expert, assignments, num_chosen, matmul):
        """expert: its index. assignments: [R], each token * K + rank. num_chosen: K. matmul: the products to use."""
        self.expert = expert
        self.covered = range(expert, expert + 1)
        self.assignments = assignments
        self.tokens = assignments // num_chosen  # [R]
        self.matmul = matmul

    def product(self, rows, weight, bias=None):
        """Return the outputs [R, N] of inputs [R, M]."""
        return self.matmul.linear_no_grad(rows, weight[self.expert], None if bias is None else bias[self.expert])

    def product_back(self, grad, weight):
        """Return the gradient of the inputs [R, M] from that of the outputs [R, N]."""
        return self.matmul.product(grad, weight[self.expert].t())

    def weight_gradient(self, grad, rows, into):
        """Write the part of the gradient [E, N, M] of the group's experts, from that of outputs and from inputs."""
        self.matmul.weight_gradient(grad, rows, out=into[self.expert])

    def bias_gradient(self, grad, into):
        """Write the part of the gradient [E, N] of the group's experts."""
        torch.sum(grad, dim=0, out=into[self.expert])

    def dot_bias(self, rows, bias):
        """Return the dot product [R] of each row with the bias of its expert."""
        return rows @ bias[self.expert]

    def add_to(self, sums, rows, weights=None):
        """Add rows [R, D], times their assignments' weights in [S, K], to the rows of their tokens in sums [S, D]."""
        if weights is not None:
            rows = rows * weights.flatten()[self.assignments, None]
        sums.index_add_(0, self.tokens, rows.to(sums.dtype))


class AllExperts:
    """The assignments to all experts, sorted by expert; only the device knows how many each expert has."""

    def __init__(self, experts, num_experts):
        """experts: [S, K]."""
        self.covered = range(num_experts)
        self.shape = experts.shape
        self.expert_of_row, self.assignments = experts.flatten().sort(stable=True)
        self.tokens = self.assignments // experts.shape[1]  # [S * K]
        numbers = torch.arange(num_experts, device=experts.device)
        self.ends = torch.searchsorted(self.expert_of_row, numbers, right=True, out_int32=True)  # [E]
        self.is_of = self.expert_of_row == numbers[:, None]  # [E, S * K]

    def product(self, rows, weight, bias=None):
        """Return the outputs [R, N] of inputs [R, M]."""
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=self.ends)
        return out if bias is None else out.add_(bias[self.expert_of_row])

    def product_back(self, grad, weight):
        """Return the gradient of the inputs [R, M] from that of the outputs [R, N]."""
        return F.grouped_mm(grad, weight, offs=self.ends)

    def weight_gradient(self, grad, rows, into):
        """Write the gradient [E, N, M], from that of outputs and from inputs."""
        into.copy_(F.grouped_mm(grad.t(), rows, offs=self.ends))
        # Some kernels write nothing for an expert without rows (pytorch issue 172439).
        into.masked_fill_(~self.is_of.any(dim=1)[:, None, None], 0)

    def bias_gradient(self, grad, into):
        """Write the gradient [E, N]."""
        # A matrix product, since index_add adds in another order each time on CUDA.
        torch.mm(self.is_of.to(grad.dtype), grad, out=into)

    def dot_bias(self, rows, bias):
        """Return the dot product [R] of each row with the bias of its expert."""
        return (rows @ bias.t()).gather(1, self.expert_of_row[:, None]).squeeze(1)

    def add_to(self, sums, rows, weights=None):
        """Add rows [R, D], times their assignments' weights in [S, K], to the rows of their tokens in sums [S, D]."""
        places = torch.empty_like(self.assignments)
        places[self.assignments] = torch.arange(len(places), device=places.device)
        # Rank by rank; all at once would need a tensor [S, K, D].
        for k, of_rank in enumerate(places.view(self.shape).unbind(1)):
            row = rows.index_select(0, of_rank)
            sums.add_(row) if weights is None else sums.addcmul_(row, weights[:, k : k + 1])
