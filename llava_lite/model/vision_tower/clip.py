"""CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020), LLaVA's tower."""

from transformers import CLIPVisionModel

from llava_lite.model.vision_tower.base import NamedEncoder, VisionTower


class ClipEncoder(CLIPVisionModel):
    """The stock encoder under a name that transformers' key renaming does not know: weights keep LLaVA's names."""


class ClipVisionTower(VisionTower):
    """CLIP at any size; its last layer is trained for the CLS token only, so LLaVA reads the one before."""

    pretrained_class = CLIPVisionModel

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return NamedEncoder(ClipEncoder._from_config(vision_config))

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return CLS and patch tokens with positions, normalised."""
        return self.encoder.pre_layrnorm(self.encoder.embeddings(pixel_values))

    @property
    def layers(self):
        """The encoder's layers."""
        return self.encoder.encoder.layers
