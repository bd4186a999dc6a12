"""DINOv2's vision transformer (Oquab et al. 2023, arXiv 2304.07193), any image size by interpolated positions."""

from transformers import Dinov2Model

from llava_lite.model.encoders.base import LayeredTower, NamedEncoder


class Dinov2Encoder(Dinov2Model):
    """transformers' encoder under another class name, which its key renaming does not match."""


class Dinov2VisionTower(LayeredTower):
    """DINOv2; its processor crops to 224 and its positions are for 518, so `mm_image_size` is the input size."""

    pretrained_class = Dinov2Model
    layers_take_mask = False

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return NamedEncoder(Dinov2Encoder._from_config(vision_config))

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return CLS and patch tokens with positions."""
        return self.encoder.embeddings(pixel_values)

    def last_norm(self, tokens):  # [N, P, C] -> [N, P, C]
        """Return tokens after the encoder's last norm."""
        return self.encoder.layernorm(tokens)

    @property
    def layers(self):
        """The encoder's layers."""
        encoder = self.encoder.encoder
        return encoder.layer if hasattr(encoder, "layer") else encoder.layers
