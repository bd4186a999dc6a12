"""CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020), LLaVA's tower."""

from torch import nn
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from llava_lite.checkpoints.copying import full_state_dict, load_into
from llava_lite.model.encoders.base import LayeredTower, NamedEncoder, open_tower


class ClipEncoder(CLIPVisionModel):
    """transformers' encoder under another class name, which its key renaming does not match: LLaVA's names stay."""


class ClipVisionTower(LayeredTower):
    """CLIP at any size; its last layer is trained for the CLS token only, so LLaVA reads the one before."""

    pretrained_class = CLIPVisionModel

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        named = NamedEncoder(ClipEncoder._from_config(vision_config))
        if self.projects:
            named.visual_projection = nn.Linear(vision_config.hidden_size, vision_config.projection_dim, bias=False)
        return named

    def load_pretrained(self, name: str | None = None, **kwargs) -> None:
        """Fill the weights from the tower's own checkpoint, by hub id or path."""
        if not self.projects:
            super().load_pretrained(name, **kwargs)
            return
        name = name or self.vision_tower_name
        opened = open_tower(CLIPVisionModelWithProjection, name, self.config, **kwargs)
        load_into(self.encoder, full_state_dict(opened.vision_model), f"weights of vision tower {name!r}")
        projection = full_state_dict(opened.visual_projection)
        load_into(self.vision_tower.visual_projection, projection, f"projection of vision tower {name!r}")

    def embed(self, pixel_values):  # [N, 3, H, W] -> [N, S, C]
        """Return CLS and patch tokens with positions, normalised."""
        return self.encoder.pre_layrnorm(self.encoder.embeddings(pixel_values))

    @property
    def layers(self):
        """The encoder's layers."""
        return self.encoder.encoder.layers
