"""Build the vision tower that a config names: pixels to features."""

from llava_lite.model.configuration import resolve_vision_config
from llava_lite.model.vision_tower.base import VisionTower
from llava_lite.model.vision_tower.clip import ClipVisionTower
from llava_lite.model.vision_tower.dinov2 import Dinov2VisionTower
from llava_lite.model.vision_tower.siglip import SiglipVisionTower

TOWERS = {
    "clip_vision_model": ClipVisionTower,
    "siglip_vision_model": SiglipVisionTower,
    "dinov2": Dinov2VisionTower,
}


def build_vision_tower(config) -> VisionTower:
    """Return the tower of a LLaVA config, its weights not loaded yet.

    Raises ValueError with the known model types if the tower is none of them.
    """
    # LLaVA's key, which only its checkpoints of several scales have.
    if getattr(config, "s2", False):
        raise ValueError(
            "config.json asks for a tower that reads a picture at several scales (s2), which is not known here; such "
            "a model's connector expects three times the width."
        )
    vision_config = resolve_vision_config(config)
    if vision_config.model_type not in TOWERS:
        raise ValueError(
            f"unknown vision tower of model_type {vision_config.model_type!r} ({config.mm_vision_tower}); "
            f"known: {', '.join(sorted(TOWERS))}."
        )
    return TOWERS[vision_config.model_type](config, vision_config)
