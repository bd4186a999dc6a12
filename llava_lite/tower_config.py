"""The config of a vision tower: where it is read, and what it says about the features of an image."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import lru_cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava_lite.hub.errors import CONFIG, find_file, readable_errors
from llava_lite.hub.json_files import check_config, read_fields
from llava_lite.hub.source import VISION_TOWER, check_source
from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.media.preprocess import image_side, load_image_processor

# Of a tower's tokens: the patches; these and the CLS token, where there is one; all but the first, whatever that is.
# The last is for MoE-LLaVA's 384 px checkpoints: it takes SigLIP's first patch for a CLS token and drops it.
# pooled is one vector an image, that of the CLS token.
SELECT_FEATURES = ("patch", "cls_patch", "drop_first", "pooled")


def feature_width(config, vision_config: PreTrainedConfig) -> int:
    """Return the width of the tower's features: of its layers, or of its projection; ValueError if it has none."""
    if not config.mm_vision_projection:
        is_blip = vision_config.model_type == "blip-2"
        return (vision_config.qformer_config if is_blip else vision_config).hidden_size
    if vision_config.model_type != "clip_vision_model":
        raise ValueError(
            f"mm_vision_projection is CLIP's, and the tower is of model_type {vision_config.model_type!r}; leave it "
            "out."
        )
    return vision_config.projection_dim


def has_class_token(vision_config: PreTrainedConfig) -> bool:
    """Tell whether the tower puts a CLS token before the patches; SigLIP does not."""
    return not vision_config.model_type.startswith("siglip")


def drops_first(select_feature: str, vision_config: PreTrainedConfig) -> bool:
    """Tell whether the first of a tower's tokens is left out."""
    return select_feature == "drop_first" or (select_feature == "patch" and has_class_token(vision_config))


def pixel_config(vision_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a tower's config that has the sizes of images and patches."""
    return vision_config.vision_config if vision_config.model_type == "blip-2" else vision_config


def num_tower_tokens(config, vision_config: PreTrainedConfig) -> int:
    """Return the number of features that the tower of a LLaVA config gives of an image, or of a crop."""
    if vision_config.model_type == "blip-2":
        return vision_config.num_query_tokens
    if config.mm_vision_select_feature == "pooled" or vision_config.model_type == "imagebind":
        return 1
    side = (config.mm_image_size or vision_config.image_size) // vision_config.patch_size
    return side * side + has_class_token(vision_config) - drops_first(config.mm_vision_select_feature, vision_config)


def vision_config_from_dict(fields: dict) -> PreTrainedConfig:
    """Build the tower's config from its fields; `model_type` names the class."""
    fields = dict(fields)
    if "model_type" not in fields:
        raise ValueError(f"vision_config needs a 'model_type' such as 'clip_vision_model'; got keys {sorted(fields)}.")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def resolve_vision_config(config) -> PreTrainedConfig:
    """Return the tower's config: `config.vision_config`, else that of the tower named `mm_vision_tower`."""
    if config.vision_config is not None:
        return config.vision_config
    if config.mm_vision_tower is None:
        raise ValueError("this config names no vision tower; set vision_config or mm_vision_tower.")
    return load_vision_config(config.mm_vision_tower)


def load_vision_config(name: str, cache_dir=None, local_files_only: bool = False, token=None) -> PreTrainedConfig:
    """Read the config of a vision tower by hub id or path; of an image-and-text model the vision part.

    The caller's own: a change of it reaches no other model. The Hub is asked once a process.
    """
    if os.path.exists(name):
        return _read_vision_config(name, cache_dir, local_files_only, token)
    return deepcopy(_ask_once(name, cache_dir, local_files_only, token))


@lru_cache(maxsize=16)
def _ask_once(name: str, cache_dir, local_files_only, token) -> PreTrainedConfig:
    return _read_vision_config(name, cache_dir, local_files_only, token)


def _read_vision_config(name: str, cache_dir, local_files_only, token) -> PreTrainedConfig:
    hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    if name.endswith(".pth") and os.path.isfile(name):
        # A release of ImageBind, which has no config beside it.
        return ImageBindConfig()
    check_source(name, "vision tower", VISION_TOWER, **hub)
    try:
        with readable_errors(name, **hub):
            fields = find_file(name, CONFIG, hub)
            if fields is not None:
                check_config(fields, read_fields(fields))
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        raise OSError(
            f"vision tower {name!r} could not be read ({str(error).splitlines()[0]}). Give a hub id such as "
            "openai/clip-vit-large-patch14-336, or a directory with config.json, preprocessor_config.json and weights."
        ) from error
    # Of a BLIP-2 the Q-Former belongs to the tower.
    return config if config.model_type == "blip-2" else getattr(config, "vision_config", config)


def get_tower_fields(vision_tower: str | None, cache_dir=None, local_files_only=False, token=None) -> dict[str, Any]:
    """Return the config keys that name a tower and its shape; from now on its weights are saved with the model."""
    if vision_tower is None:
        return {}
    vision = load_vision_config(vision_tower, cache_dir, local_files_only, token)
    fields = {"mm_vision_tower": vision_tower, "vision_config": vision}
    if vision.model_type == "dinov2":
        # DINOv2's positions are for 518 px while its processor crops to 224: feed what the processor gives.
        fields["mm_image_size"] = image_side(load_image_processor(vision_tower))
    return fields
