"""A linear layer and N gated MLPs with residuals: ImageBind-LLM's bind network (Han et al. 2023, arXiv 2309.03905).

N images, P features of an image, C tower width, D model width.
"""

import re

from torch import nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden):  # [.., D] -> [.., D]
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class GatedMlps(nn.Module):
    """Features [N, P, C] to [N, P, D]: one linear layer, then N times x + mlp(norm(x)).

    norm: rms, or layer with biases in the MLPs, as the first released weights of ImageBind-LLM have them.
    """

    def __init__(self, in_width: int, out_width: int, depth: int, expansion: int = 4, norm: str = "rms"):
        super().__init__()
        has_bias = norm == "layer"
        make = nn.LayerNorm if has_bias else nn.RMSNorm
        eps = 1e-5 if has_bias else NORM_EPS
        self.proj = nn.Linear(in_width, out_width)
        self.norms = nn.ModuleList(make(out_width, eps=eps) for _ in range(depth))
        self.mlps = nn.ModuleList(GatedMlp(out_width, expansion * out_width, has_bias) for _ in range(depth))

    def forward(self, features):  # [N, P, C] -> [N, P, D]
        hidden = self.proj(features)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            hidden = hidden + mlp(norm(hidden))
        return hidden


def build_gated_mlp(config) -> nn.Module:
    """Return the connector of a config's mm_gate_* keys; gated_mlp3x of ImageBind-LLM has three MLPs."""
    depth = int(re.fullmatch(r"gated_mlp(\d+)x", config.mm_projector_type).group(1))
    return GatedMlps(config.mm_hidden_size, config.hidden_size, depth, config.mm_gate_expansion, config.mm_gate_norm)
