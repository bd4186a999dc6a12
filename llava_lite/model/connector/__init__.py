"""Build the connector that a config names: vision features to the decoder's width."""

import re

from torch import nn

from llava_lite.model.connector.linear import build_identity, build_linear
from llava_lite.model.connector.mlp import build_mlp_gelu

CONNECTORS = {
    "linear": build_linear,
    "identity": build_identity,
    "mlpNx_gelu": build_mlp_gelu,
}


def build_connector(config) -> nn.Module:
    """Return the connector of `config.mm_projector_type`, [.., mm_hidden_size] -> [.., hidden_size].

    Raises ValueError with the known types if the name is none of them.
    """
    kind = re.sub(r"^mlp[1-9]\d*x_gelu$", "mlpNx_gelu", config.mm_projector_type)
    if kind not in CONNECTORS or config.mm_projector_type == "mlpNx_gelu":
        raise ValueError(
            f"unknown connector {config.mm_projector_type!r}; known: {', '.join(sorted(CONNECTORS))} "
            "with a number for N, e.g. mlp2x_gelu."
        )
    return CONNECTORS[kind](config)
