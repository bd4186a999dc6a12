"""A linear layer from the tower's width to the decoder's, alone or with a norm, or the identity."""

from torch import nn


def build_linear(config) -> nn.Module:
    """Return Linear(mm_hidden_size, hidden_size), LLaVA v1's connector."""
    return nn.Linear(config.mm_hidden_size, config.hidden_size)


def build_linear_norm(config) -> nn.Module:
    """Return Linear and LayerNorm, LLaMA2-Accessory's connector behind a Q-Former; weights are named 0 and 1."""
    return nn.Sequential(nn.Linear(config.mm_hidden_size, config.hidden_size), nn.LayerNorm(config.hidden_size))


class IdentityConnector(nn.Module):
    """Return features unchanged; `mm_projector_type` "identity" in LLaVA's configs."""

    def forward(self, features):  # [.., C] -> [.., C]
        return features


def build_identity(config) -> nn.Module:
    """Return the identity; the tower must already have the decoder's width."""
    if config.mm_hidden_size != config.hidden_size:
        raise ValueError(
            f"mm_projector_type 'identity' needs a tower as wide as the decoder; got mm_hidden_size "
            f"{config.mm_hidden_size} and hidden_size {config.hidden_size}. Use linear or mlp2x_gelu."
        )
    return IdentityConnector()
