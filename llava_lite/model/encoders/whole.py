"""Towers of which every layer runs, and whose encoder makes the features itself: BLIP-2's image side and ImageBind.

N images, P features of an image, C width of a feature.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
from torch import nn

from llava_lite.checkpoints.copying import full_state_dict, load_into
from llava_lite.model.encoders.base import VisionTower, find_image_processor
from llava_lite.model.encoders.blip2 import Blip2Encoder, open_blip2
from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.model.encoders.imagebind.opening import branch_of, open_imagebind
from llava_lite.tower_config import num_tower_tokens, pixel_config


class WholeTower(VisionTower):
    """A tower without a layer or tokens to select; mm_vision_select_layer and _feature have no effect."""

    def read(self, select_layer: int, select_feature: str) -> None:
        """Take note of the keys, which change nothing here."""
        self.select_layer, self.select_feature = select_layer, select_feature
        self.num_read_layers = pixel_config(self.config).num_hidden_layers

    @property
    def encoder(self) -> nn.Module:
        """The encoder."""
        return self.vision_tower

    def unread(self) -> set[nn.Parameter]:
        """Return the weights that an image never reaches."""
        return set()

    def load_pretrained(self, name: str | None = None, **kwargs) -> None:
        """Fill the weights from the encoder's own checkpoint, by hub id or path."""
        name = name or self.vision_tower_name
        opened = self.open_encoder(name, **kwargs)
        load_into(self.encoder, full_state_dict(opened), f"weights of vision tower {name!r}")

    @abstractmethod
    def open_encoder(self, name: str, **kwargs) -> nn.Module:
        """Return the encoder of a checkpoint."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the encoder's input images."""
        return pixel_config(self.config).image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // pixel_config(self.config).patch_size

    @property
    def num_features(self) -> int:
        """Features P of an image."""
        return num_tower_tokens(self.llava_config, self.config)


class Blip2Tower(WholeTower):
    """BLIP-2's ViT and Q-Former: 32 features of width 768 (LLaMA2-Accessory's tower)."""

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return Blip2Encoder._from_config(vision_config)

    def encode_pixels(self, pixel_values):  # [N, 3, H, W] -> [N, 32, 768]
        """Return the features of the query tokens."""
        return self.encoder(pixel_values)

    def open_encoder(self, name, **kwargs):
        """Return the encoder of a BLIP-2 checkpoint, without its language model."""
        return open_blip2(name, self.config, **kwargs)

    @property
    def layers(self):
        """The layers of the ViT."""
        return self.encoder.vision_model.encoder.layers


class ImageBindTower(WholeTower):
    """ImageBind: one vector of an image, and of other media by `encode` (ImageBind-LLM's tower)."""

    def build_encoder(self, vision_config):
        """Return the encoder with random weights."""
        return ImageBindModel._from_config(vision_config)

    def encode_pixels(self, pixel_values):  # [N, 3, H, W] -> [N, 1, C]
        """Return one vector of each image."""
        return self.encoder(pixel_values)[:, None]

    def encode(self, kind: str, inputs: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [N, C] of any kind of media that the encoder knows; see ImageBindModel.encode."""
        return self.encoder.encode(kind, inputs.to(self.device))

    def open_encoder(self, name, **kwargs):
        """Return the encoder of a directory, a hub id or a released .pth file."""
        return open_imagebind(name, self.config, self.config.modalities, **kwargs)

    def unread(self) -> set[nn.Parameter]:
        """Return the weights of the other media, which no image reaches."""
        return {weight for name, weight in self.named_parameters() if ".vision." not in name}

    def train(self, mode: bool = True):
        """Set the mode of the branch of images; the others, which never train, keep their features: no dropout."""
        super().train(mode)
        for name, module in self.encoder.named_modules():
            if branch_of(name) not in (None, "", "vision"):
                module.train(False)
        return self

    @property
    def layers(self):
        """The layers of the branch of images."""
        return self.encoder.modality_trunks["vision"].blocks

    @cached_property
    def image_processor(self):
        """The image processor saved beside model or encoder, else CLIP's at the encoder's size, as in the original."""
        try:
            return find_image_processor(self.llava_config)
        except OSError:
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            side = self.config.image_size
            return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
