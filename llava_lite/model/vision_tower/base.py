"""What every vision tower does: run the encoder up to the layer that is read and pick its tokens.

N pictures, S tokens of a picture inside the tower, P features that leave it, C tower width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import nn

from llava_lite.mm_utils import load_image_processor
from llava_lite.model.configuration import drops_first
from llava_lite.model.placement import place_of
from llava_lite.model.weights import full_state_dict, load_into
from llava_lite.picture_steps import PictureSteps, read_steps

UNREAD = re.compile(r"\.vision_model\.(post_layernorm|layernorm|head|pooler)\.|mask_token")


def open_tower(tower_class, name: str, config, **kwargs):
    """Return a tower of transformers from its own checkpoint; ValueError if that lacks weights of it."""
    # Here, since it is read while the package of models is.
    from llava_lite.model.loading import own_accounting

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
    """Hold the encoder as `vision_model`, so that weights carry LLaVA's names on every transformers version."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.vision_model = encoder

    def forward(self, *args, **kwargs):
        """Run the whole encoder, as transformers does."""
        return self.vision_model(*args, **kwargs)


class VisionTower(nn.Module, ABC):
    """Pixels [N, 3, H, W] to features [N, P, C]; a leaf states how its encoder embeds pixels and names its layers."""

    # The stock class whose checkpoint a leaf reads; set by each leaf.
    pretrained_class: type
    layers_take_mask = True

    def __init__(self, config, vision_config):
        super().__init__()
        self.llava_config = config
        self.config = vision_config
        self.vision_tower_name = config.mm_vision_tower
        self.read(config.mm_vision_select_layer, config.mm_vision_select_feature)
        self.vision_tower = self.build_encoder(vision_config)
        # No buffers: they would be saved, cast to the tower's dtype, or left empty by a load that skips them.
        self._constants = None
        # Else whoever trains all that requires a gradient (DDP, a test of checkpointing) waits for theirs in vain.
        for param in self.unread():
            param.requires_grad_(False)

    @abstractmethod
    def build_encoder(self, vision_config) -> nn.Module:
        """Return the encoder module with random weights."""

    @abstractmethod
    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tokens that enter the first layer, [N, S, C]."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """All encoder layers; those from `num_read_layers` on are kept for saving and never run."""

    @property
    def encoder(self) -> nn.Module:
        """The stock transformers model inside."""
        return self.vision_tower.vision_model

    def read(self, select_layer: int, select_feature: str) -> None:
        """Choose the layer that is read, and which of its tokens (SELECT_FEATURES)."""
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.num_read_layers = count_read_layers(select_layer, self.config.num_hidden_layers)

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Return features [N, P, C] of pictures [N, 3, H, W], in the tower's dtype.

        Numbers are taken for normalised, bytes (uint8) are normalised here, as the image processor does.
        A list of pictures [3, H, W] gives a list of features [1, P, C], as in LLaVA. Where neither the tower trains
        nor the images want a gradient it runs without: the graph would hold activations that nobody reads.
        """
        if isinstance(images, list):
            return [self(picture[None]) for picture in images]
        trains = images.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            hidden = self.embed(self.pixels(images))  # [N, S, C]
            for layer in self.layers[: self.num_read_layers]:
                hidden = layer(hidden, attention_mask=None) if self.layers_take_mask else layer(hidden)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.select_tokens(hidden)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Return pictures [N, 3, H, W] normalised, in the tower's dtype and on its device.

        Where accelerate brings its weights when they are needed, its hooks move the pixels too.
        """
        images = images.to(place_of(self, images.device))
        if images.dtype == torch.uint8:
            if self._constants is None or self._constants[0].device != images.device:
                self._constants = self.steps.constants(images.device)
            images = self.steps.normalise(images, self._constants)
        return images.to(self.dtype)

    @cached_property
    def steps(self) -> PictureSteps:
        """What the image processor does to a picture; ValueError where that is no plain normalisation."""
        return read_steps(self.image_processor)

    def select_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return those tokens [N, P, C] of a layer's output [N, S, C] that are read."""
        return hidden[:, 1:] if drops_first(self.select_feature, self.config) else hidden

    def feature_select(self, image_forward_outs) -> torch.Tensor:
        """Return the features in the output of the whole encoder with output_hidden_states=True (LLaVA's name)."""
        return self.select_tokens(image_forward_outs.hidden_states[self.select_layer])

    def unread(self) -> set[nn.Parameter]:
        """Return the weights that no forward pass reads: later layers, what follows the last, pre-training's token."""
        late = {param for layer in self.layers[self.num_read_layers :] for param in layer.parameters()}
        return late | {param for name, param in self.named_parameters() if UNREAD.search(name)}

    def load_pretrained(self, name: str | None = None, **kwargs) -> None:
        """Fill the weights from the tower's own checkpoint, by hub id or path."""
        name = name or self.vision_tower_name
        stock = open_tower(self.pretrained_class, name, self.config, **kwargs)
        load_into(self.encoder, full_state_dict(stock), f"weights of vision tower {name!r}")

    @cached_property
    def image_processor(self):
        """The picture preprocessing saved beside the model, else beside the tower."""
        return find_image_processor(self.llava_config)

    @property
    def is_loaded(self) -> bool:
        """Always true: the tower is built with the model (LLaVA's name for a delayed load)."""
        return True

    def load_model(self, device_map=None) -> None:
        """Do nothing: see is_loaded."""

    @property
    def dummy_feature(self) -> torch.Tensor:
        """A feature of zeros [1, C], as a stand-in for a picture."""
        return torch.zeros(1, self.hidden_size, device=place_of(self, torch.device("cpu")), dtype=self.dtype)

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
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the tower is fed."""
        return self.llava_config.mm_image_size or self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a picture, CLS not counted."""
        return self.num_patches_per_side**2


def count_read_layers(select_layer: int, num_layers: int) -> int:
    """Return how many encoder layers run so that `hidden_states[select_layer]` exists; 23 for CLIP-L and -2."""
    count = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= count <= num_layers:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} does not exist in a tower of {num_layers} layers; "
            f"give {-num_layers - 1} to {num_layers}."
        )
    return count


def find_image_processor(config):
    """Return the image processor saved with the model's folder, else the tower's own."""
    places = [p for p in (config._name_or_path, config.mm_vision_tower) if p]
    errors = []
    for place in places:
        try:
            return load_image_processor(place)
        except (OSError, ValueError) as error:
            errors.append(f"{place!r}: {error}")
    raise OSError(
        "no image processor found; tried "
        + ("; ".join(errors) or "nothing, since config names no folder or tower")
        + ". Save one beside the model (preprocessor_config.json)."
    )
