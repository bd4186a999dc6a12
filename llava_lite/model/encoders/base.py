"""The base class of vision towers: run the encoder up to the selected layer and select its tokens.

N images, S tokens of an image inside the tower, P features of its output, C tower width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import nn

from llava_lite.checkpoints.copying import full_state_dict, load_into
from llava_lite.checkpoints.files import check_before_opening, read_shapes
from llava_lite.checkpoints.sizes import check_sizes
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.hub.errors import HUB_ARGUMENTS
from llava_lite.media.preprocess import load_image_processor
from llava_lite.media.transform import ImageTransform, read_transform
from llava_lite.model.placement import get_device
from llava_lite.tower_config import drops_first, feature_width

UNREAD = re.compile(r"\.vision_model\.(post_layernorm|layernorm|head|pooler)\.|mask_token")


def open_tower(tower_class, name: str, config, **kwargs):
    """Return a tower of transformers from its own checkpoint; ValueError if the checkpoint lacks weights of it."""
    from llava_lite.model.loading import own_accounting

    checkpoint = Checkpoint(name, **{key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS})
    check_sizes(checkpoint, config, read_shapes(checkpoint))
    check_before_opening(checkpoint)
    with own_accounting():
        tower, info = tower_class.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"{str(name)!r} is not the {tower_class.__name__} that the model was made for: {len(wrong)} weights are "
            f"missing or of another shape, such as {wrong[:3]}. Name the tower that it was trained with."
        )
    return tower


class NamedEncoder(nn.Module):
    """Hold the encoder as `vision_model`, so that weights have LLaVA's names with every transformers version."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.vision_model = encoder

    def forward(self, *args, **kwargs):
        """Run the full encoder, as transformers does."""
        return self.vision_model(*args, **kwargs)


class VisionTower(nn.Module, ABC):
    """Pixels [N, 3, H, W] to features [N, P, C]; a subclass builds an encoder, runs it and names its layers."""

    # The class of transformers whose checkpoint a subclass reads; set by each subclass.
    pretrained_class: type

    def __init__(self, config, vision_config):
        super().__init__()
        self.llava_config = config
        self.config = vision_config
        self.vision_tower_name = config.mm_vision_tower
        self.projects = config.mm_vision_projection
        self.read(config.mm_vision_select_layer, config.mm_vision_select_feature)
        self.vision_tower = self.build_encoder(vision_config)
        # Not buffers, which would be saved, cast to the tower's dtype, or left empty by a load that skips them.
        self._constants = None
        # DDP waits for a gradient of every parameter that requires one, and these never get one.
        for param in self.unread():
            param.requires_grad_(False)

    @abstractmethod
    def build_encoder(self, vision_config) -> nn.Module:
        """Return the encoder module with random weights."""

    @abstractmethod
    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [N, P, C] of normalised images [N, 3, H, W]."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """All encoder layers; those from `num_read_layers` on are saved with the tower and never run."""

    @property
    def encoder(self) -> nn.Module:
        """The model of transformers inside."""
        return self.vision_tower.vision_model

    def read(self, select_layer: int, select_feature: str) -> None:
        """Select the layer to read, and which of its tokens (SELECT_FEATURES)."""
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.num_read_layers = count_read_layers(select_layer, self.config.num_hidden_layers)

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Return features [N, P, C] of images [N, 3, H, W], in the tower's dtype.

        Floats are expected to be normalised; bytes (uint8) are normalised here, as the image processor does. A list
        of images [3, H, W] gives a list of features [1, P, C], as in LLaVA. A frozen tower runs without gradients,
        unless the images require one.
        """
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        trains = images.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return self.encode_pixels(self.pixels(images))

    def read_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the features [N, P, C] of the selected layer's output [N, S, C]."""
        if self.select_feature == "pooled":
            return self.project(self.pool(hidden))
        tokens = self.select_tokens(hidden)
        return self.project(self.last_norm(tokens)) if self.projects else tokens

    def last_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, P, C] after the encoder's last norm."""
        return self.encoder.post_layernorm(tokens)

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return one vector of each image, [N, 1, C] of [N, S, C]: the CLS token after the last norm."""
        return self.last_norm(hidden[:, :1])

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, P, C] in the space that a tower shares with text; as they are where that was not asked."""
        return self.vision_tower.visual_projection(tokens) if self.projects else tokens

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Return images [N, 3, H, W] normalised, in the tower's dtype and on its device.

        With offloaded weights, accelerate's hooks move the pixels too.
        """
        images = images.to(get_device(self, images.device))
        if images.dtype == torch.uint8:
            if self._constants is None or self._constants[0].device != images.device:
                self._constants = self.steps.constants(images.device)
            images = self.steps.normalise(images, self._constants)
        return images.to(self.dtype)

    @cached_property
    def steps(self) -> ImageTransform:
        """The transform of the image processor; ValueError if it is not a plain normalisation."""
        return read_transform(self.image_processor)

    def select_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the selected tokens [N, P, C] of a layer's output [N, S, C]."""
        return hidden[:, 1:] if drops_first(self.select_feature, self.config) else hidden

    def feature_select(self, image_forward_outs) -> torch.Tensor:
        """Return the features in the output of the full encoder with output_hidden_states=True (LLaVA's name)."""
        return self.select_tokens(image_forward_outs.hidden_states[self.select_layer])

    def unread(self) -> set[nn.Parameter]:
        """Return the weights that no forward pass reads: later layers, final norms and poolers, the mask token."""
        late = {param for layer in self.layers[self.num_read_layers :] for param in layer.parameters()}
        unread = {param for name, param in self.named_parameters() if UNREAD.search(name)}
        if self.select_feature == "pooled" or self.projects:
            # Pooling reads all of them but the token that stands for masked patches.
            unread = {param for name, param in self.named_parameters() if "mask_token" in name}
        return late | unread

    def load_pretrained(self, name: str | None = None, **kwargs) -> None:
        """Fill the weights from the tower's own checkpoint, by hub id or path."""
        name = name or self.vision_tower_name
        opened = open_tower(self.pretrained_class, name, self.config, **kwargs)
        load_into(self.encoder, full_state_dict(opened), f"weights of vision tower {name!r}")

    @cached_property
    def image_processor(self):
        """The image processor saved beside the model, else beside the tower."""
        return find_image_processor(self.llava_config)

    @property
    def is_loaded(self) -> bool:
        """Always true: the tower is built with the model (LLaVA's name for a delayed load)."""
        return True

    def load_model(self, device_map=None) -> None:
        """Do nothing: see is_loaded."""

    @property
    def dummy_feature(self) -> torch.Tensor:
        """A feature of zeros [1, C], in place of an image."""
        return torch.zeros(1, self.hidden_size, device=get_device(self, torch.device("cpu")), dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def hidden_size(self) -> int:
        """Width C of a feature."""
        return feature_width(self.llava_config, self.config)

    @property
    def image_size(self) -> int:
        """Side in pixels of the tower's input images."""
        return self.llava_config.mm_image_size or self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, CLS not counted."""
        return self.num_patches_per_side**2


class LayeredTower(VisionTower):
    """A tower that runs up to the selected layer; a subclass embeds pixels and names the layers of its encoder."""

    layers_take_mask = True

    @abstractmethod
    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tokens that enter the first layer, [N, S, C]."""

    def encode_pixels(self, pixel_values):
        """Return the features [N, P, C] that mm_vision_select_layer and _feature select."""
        hidden = self.embed(pixel_values)  # [N, S, C]
        for layer in self.layers[: self.num_read_layers]:
            hidden = layer(hidden, attention_mask=None) if self.layers_take_mask else layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.read_tokens(hidden)


def count_read_layers(select_layer: int, num_layers: int) -> int:
    """Return the number of encoder layers to run for `hidden_states[select_layer]`; 23 for CLIP-L and -2."""
    count = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= count <= num_layers:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} does not exist in a tower of {num_layers} layers; "
            f"give {-num_layers - 1} to {num_layers}."
        )
    return count


def find_image_processor(config):
    """Return the image processor saved with the model's directory, else the tower's own."""
    places = [p for p in (config._name_or_path, config.mm_vision_tower) if p]
    errors = []
    for place in places:
        try:
            return load_image_processor(place)
        except (OSError, ValueError) as error:
            errors.append(f"{place!r}: {error}")
    raise OSError(
        "no image processor found; tried "
        + ("; ".join(errors) or "nothing, since config names no directory or tower")
        + ". Save one beside the model (preprocessor_config.json)."
    )
