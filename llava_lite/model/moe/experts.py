"""Hold the experts of one MoE layer in fused 3-D weights and run each token through the experts it is assigned to.

The names and shapes of the weights are those of transformers' experts interface, whose functions run one expert after
the other (`eager`), one batched product (`batched_mm`) or one grouped product (`grouped_mm`, its default). The default
here is our own function, registered with them as `llava_lite`.

Shapes: `S` tokens, `K` experts of a token, `E` experts, `D` model width, `I` width of an expert.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from llava_lite.model.matmul import UsesMatmul
from llava_lite.model.moe.grouped import can_run, grouped_experts

# The function that runs the experts unless a user names another one of transformers' experts interface.
OWN = "llava_lite"
# Device -> up to how many assignments (decoding) a function of transformers is faster than ours, which sorts them.
FEW_ASSIGNMENTS = {"cuda": (16, "batched_mm"), "cpu": (256, "grouped_mm")}
ALL_EXPERTS_FUNCTIONS.register(OWN, grouped_experts)


@dataclass(frozen=True)
class MlpShape:
    """What kind of dense MLP the experts are copies of."""

    gated: bool  # gate_proj, up_proj, down_proj; else fc1, fc2
    biased: bool
    hidden_size: int
    intermediate_size: int

    @classmethod
    def of(cls, dense_mlp):
        """Read the shape from the layers of a dense MLP, whether or not its weights are partitioned."""
        gated = hasattr(dense_mlp, "gate_proj")
        if not gated and not hasattr(dense_mlp, "fc1"):
            names = ", ".join(name for name, _ in dense_mlp.named_children())
            raise ValueError(
                f"{type(dense_mlp).__name__} has layers {names}; experts are made from gate_proj, up_proj and "
                "down_proj, or from fc1 and fc2."
            )
        up = dense_mlp.up_proj if gated else dense_mlp.fc1
        return cls(gated, up.bias is not None, up.in_features, up.out_features)

    @property
    def up_names(self):
        """The dense layers whose weights are stacked into the experts' first weight."""
        return ("gate_proj", "up_proj") if self.gated else ("fc1",)

    @property
    def down_name(self):
        """The dense layer whose weight is the experts' last weight."""
        return "down_proj" if self.gated else "fc2"


@use_experts_implementation
class FusedExperts(nn.Module):
    """The weights of all experts of a layer, empty until they are drawn, copied or loaded."""

    def __init__(self, config, num_experts, shape: MlpShape, dtype=None, device=None):
        super().__init__()
        self.num_experts = num_experts
        self.shape = shape
        self.up_name = "gate_up_proj" if shape.gated else "up_proj"
        self.act_fn = ACT2FN[config.hidden_act]
        self.add_weights(dtype, device)

    def add_weights(self, dtype, device):
        """Register the weights, empty."""
        shape, num_experts = self.shape, self.num_experts
        width, hidden = shape.intermediate_size * len(shape.up_names), shape.hidden_size
        shapes = {self.up_name: (width, hidden), "down_proj": (hidden, shape.intermediate_size)}
        if shape.biased:
            shapes |= {f"{self.up_name}_bias": (width,), "down_proj_bias": (hidden,)}
        for name, of_one in shapes.items():
            weight = torch.empty(num_experts, *of_one, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(weight))

    def reset_parameters(self, std):
        """Draw the weights from N(0, std^2), as transformers does for the dense MLP; biases are 0."""
        for name, param in self.named_parameters():
            init.zeros_(param) if name.endswith("_bias") else init.normal_(param, std=std)

    @torch.no_grad()
    def copy_dense_mlp(self, dense_mlp):
        """Make every expert a copy of the dense MLP, whose weights must be gathered."""
        ups = [getattr(dense_mlp, name) for name in self.shape.up_names]
        down = getattr(dense_mlp, self.shape.down_name)
        getattr(self, self.up_name).copy_(torch.cat([up.weight for up in ups]))  # [E, 2I, D] or [E, I, D]
        self.down_proj.copy_(down.weight)
        if self.shape.biased:
            getattr(self, f"{self.up_name}_bias").copy_(torch.cat([up.bias for up in ups]))
            self.down_proj_bias.copy_(down.bias)

    def forward(self, tokens, experts, weights):
        """Run the experts by the config's implementation; the decorator puts its choice around this."""
        return self.run_one_by_one(tokens, experts, weights)

    def run_one_by_one(self, tokens, experts, weights):
        """Return the weighted sum of the assigned experts' outputs [S, D], one expert after the other.

        tokens: [S, D]; experts, weights: [S, K]. Every expert runs, without tokens too, so that its weights are in the
        graph on every rank.
        """
        ups, up_biases = self._unbind_experts(self.up_name)
        downs, down_biases = self._unbind_experts("down_proj")
        mixed = torch.zeros_like(tokens, dtype=weights.dtype)
        for expert in range(self.num_experts):
            token, rank = torch.where(experts == expert)
            inner = F.linear(tokens[token], ups[expert], up_biases[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            out = F.linear(inner, downs[expert], down_biases[expert])
            mixed.index_add_(0, token, (out * weights[token, rank, None]).to(mixed.dtype))
        return mixed.to(tokens.dtype)

    def _unbind_experts(self, name):
        # unbind and not weight[expert]: the gradient of an index is as large as all experts, once for each of them.
        biases = getattr(self, f"{name}_bias").unbind(0) if self.shape.biased else [None] * self.num_experts
        return getattr(self, name).unbind(0), biases


class Experts(UsesMatmul, FusedExperts):
    """The experts of a layer, run by the function that fits device, dtype and widths unless the config names one."""

    def __init__(self, config, num_experts, shape: MlpShape, dtype=None, device=None):
        super().__init__(config, num_experts, shape, dtype, device)
        # The decorator sets these for its class; here they depend on the dense MLP.
        self.has_gate, self.has_bias = shape.gated, shape.biased

    def forward(self, tokens, experts, weights):
        """Return the weighted sum of the assigned experts' outputs [S, D], by the config's implementation.

        tokens: [S, D]; experts, weights: [S, K].
        """
        absent = [name for name, weight in self.named_parameters(recurse=False) if weight.is_meta]
        if absent and not tokens.is_meta:
            # torch ignores a term on the meta device in a sum, without an error.
            raise ValueError(
                f"{', '.join(absent)} of the experts were not loaded: a device map that names a single parameter "
                "brings it for no call. Keep layers whole: no_split_module_classes=model._no_split_modules."
            )
        implementation = self.config._experts_implementation
        if implementation in (None, OWN):
            implementation = self._best_implementation(tokens, experts)
        # transformers' grouped product needs rows of a multiple of 16 bytes.
        row_bytes = (side * tokens.element_size() for side in (self.shape.hidden_size, self.shape.intermediate_size))
        if implementation == "grouped_mm" and any(size % 16 for size in row_bytes):
            implementation = "eager"
        run = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, type(self).run_one_by_one)
        return run(self, tokens, experts, weights)

    def _best_implementation(self, tokens, experts):
        most, of_few = FEW_ASSIGNMENTS.get(tokens.device.type, (0, OWN))
        if not torch.is_grad_enabled() and experts.numel() <= most:
            return of_few
        plain = "experts" in self.plain_paths or torch.compiler.is_compiling() or not can_run(self, tokens)
        return "grouped_mm" if plain else OWN
