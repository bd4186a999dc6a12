"""Build the vision tower that a config names: pixels to features."""

from transformers import AutoModel

from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.model.encoders.base import VisionTower
from llava_lite.model.encoders.clip import ClipVisionTower
from llava_lite.model.encoders.dinov2 import Dinov2VisionTower
from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.model.encoders.siglip import SiglipVisionTower
from llava_lite.model.encoders.whole import Blip2Tower, ImageBindTower
from llava_lite.tower_config import resolve_vision_config

# transformers has no ImageBind, so that its Auto class is told of ours.
AutoModel.register(ImageBindConfig, ImageBindModel, exist_ok=True)

TOWERS = {
    "clip_vision_model": ClipVisionTower,
    "siglip_vision_model": SiglipVisionTower,
    "dinov2": Dinov2VisionTower,
    "blip-2": Blip2Tower,
    "imagebind": ImageBindTower,
}


def build_vision_tower(config) -> VisionTower:
    """Return the tower of a LLaVA config, its weights not loaded yet.

    Raises ValueError with the known model types if the tower is none of them.
    """
    # LLaVA's key, set only in its multi-scale checkpoints.
    if getattr(config, "s2", False):
        raise ValueError(
            "config.json has s2, a tower that reads an image at several scales, which is not supported: the model's "
            "connector expects three times the tower's width."
        )
    vision_config = resolve_vision_config(config)
    if vision_config.model_type not in TOWERS:
        raise ValueError(
            f"unknown vision tower of model_type {vision_config.model_type!r} ({config.mm_vision_tower}); "
            f"known: {', '.join(sorted(TOWERS))}."
        )
    return TOWERS[vision_config.model_type](config, vision_config)
