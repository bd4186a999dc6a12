"""SigLIP's vision transformer (Zhai et al. 2023, arXiv 2303.15343): no CLS token, every token is a patch.

MoE-LLaVA drops the first token here too and so loses a patch; we keep all 729 of so400m-patch14-384, unless
`mm_vision_select_feature` is drop_first, as it is in a checkpoint of MoE-LLaVA.
"""

from transformers import SiglipVisionModel

from llava_lite.model.vision_tower.base import NamedEncoder, VisionTower


class SiglipEncoder(SiglipVisionModel):
    """The stock encoder under a name that transformers' key renaming does not know: weights keep LLaVA's names."""


class SiglipVisionTower(VisionTower):
    """SigLIP at any size."""

    pretrained_class = SiglipVisionModel

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return NamedEncoder(SiglipEncoder._from_config(vision_config))

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return patch tokens with positions."""
        return self.encoder.embeddings(pixel_values)

    @property
    def layers(self):
        """The encoder's layers."""
        return self.encoder.encoder.layers
