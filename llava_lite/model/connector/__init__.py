"""Build the connector that a config names: vision features to the decoder's width."""

import re

from torch import nn

from llava_lite.model.connector.gated_mlp import build_gated_mlp
from llava_lite.model.connector.linear import build_identity, build_linear, build_linear_norm
from llava_lite.model.connector.mlp import build_mlp_gelu
from llava_lite.model.connector.query_vit import build_query_vit

# Names with a number have N in its place.
CONNECTORS = {
    "linear": build_linear,
    "linear_norm": build_linear_norm,
    "identity": build_identity,
    "mlpNx_gelu": build_mlp_gelu,
    "gated_mlpNx": build_gated_mlp,
    "query_vit": build_query_vit,
}


def build_connector(config) -> nn.Module:
    """Return the connector of `config.mm_projector_type`, [.., mm_hidden_size] -> [.., hidden_size].

    Raises ValueError with the known types if the name is none of them.
    """
    kind = re.sub(r"^(mlp|gated_mlp)[1-9]\d*x(_gelu)?$", r"\1Nx\2", config.mm_projector_type)
    if kind not in CONNECTORS or "N" in config.mm_projector_type:
        raise ValueError(
            f"unknown connector {config.mm_projector_type!r}; known: {', '.join(sorted(CONNECTORS))} "
            "with a number for N, e.g. mlp2x_gelu."
        )
    return CONNECTORS[kind](config)
