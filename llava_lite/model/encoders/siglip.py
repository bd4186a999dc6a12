"""SigLIP's vision transformer (Zhai et al. 2023, arXiv 2303.15343): no CLS token, every token is a patch.

MoE-LLaVA drops the first token here too and so loses a patch; we keep all 729 of so400m-patch14-384, unless
`mm_vision_select_feature` is drop_first, as it is in a checkpoint of MoE-LLaVA.
"""

from transformers import SiglipVisionModel

from llava_lite.model.encoders.base import LayeredTower, NamedEncoder


class SiglipEncoder(SiglipVisionModel):
    """transformers' encoder under another class name, which its key renaming does not match: LLaVA's names stay."""


class SiglipVisionTower(LayeredTower):
    """SigLIP at any size."""

    pretrained_class = SiglipVisionModel

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return NamedEncoder(SiglipEncoder._from_config(vision_config))

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return patch tokens with positions."""
        return self.encoder.embeddings(pixel_values)

    def pool(self, hidden):  # [N, S, C] -> [N, 1, C]
        """Return SigLIP's pooled vector, of a query that attends to all patches."""
        if not hasattr(self.encoder, "head"):
            raise ValueError("mm_vision_select_feature pooled: the SigLIP tower has no pooling head; use patch.")
        return self.encoder.head(self.last_norm(hidden))[:, None]

    @property
    def layers(self):
        """The encoder's layers."""
        return self.encoder.encoder.layers
