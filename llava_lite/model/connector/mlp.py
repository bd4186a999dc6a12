"""N linear layers with GELU between them: LLaVA-1.5's connector (Liu et al. 2023, arXiv 2310.03744, section 3.4)."""

import re

from torch import nn


def build_mlp_gelu(config) -> nn.Module:
    """Return Linear, then N - 1 times GELU and Linear; weights are named 0, 2, 4, ..."""
    depth = int(re.fullmatch(r"mlp(\d+)x_gelu", config.mm_projector_type).group(1))
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
