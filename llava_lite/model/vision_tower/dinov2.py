"""DINOv2's vision transformer (Oquab et al. 2023, arXiv 2304.07193), any picture size by interpolated positions."""

from transformers import Dinov2Model

from llava_lite.model.vision_tower.base import NamedEncoder, VisionTower


class Dinov2Encoder(Dinov2Model):
    """The stock encoder under a name that transformers' key renaming does not know."""


class Dinov2VisionTower(VisionTower):
    """DINOv2; its processor crops to 224 while its positions are for 518, so `mm_image_size` says what it is fed."""

    pretrained_class = Dinov2Model
    layers_take_mask = False

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return NamedEncoder(Dinov2Encoder._from_config(vision_config))

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return CLS and patch tokens with positions."""
        return self.encoder.embeddings(pixel_values)

    @property
    def layers(self):
        """The encoder's layers."""
        encoder = self.encoder.encoder
        return encoder.layer if hasattr(encoder, "layer") else encoder.layers
