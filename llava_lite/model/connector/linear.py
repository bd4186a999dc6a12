"""One matrix from the tower's width to the decoder's, or nothing at all."""

from torch import nn


def build_linear(config) -> nn.Module:
    """Return Linear(mm_hidden_size, hidden_size), LLaVA v1's connector."""
    return nn.Linear(config.mm_hidden_size, config.hidden_size)


class IdentityConnector(nn.Module):
    """Pass features on; `mm_projector_type` in LLaVA's configs is "identity"."""

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
