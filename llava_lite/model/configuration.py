"""The config keys that make a decoder's config a LLaVA one, shared by every backbone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from transformers import AutoConfig, PreTrainedConfig

from llava_lite.anyres import PictureLayout
from llava_lite.formats import foreign_format
from llava_lite.hub import in_words
from llava_lite.model_source import VISION_TOWER, check_source

# Of a tower's tokens: the patches; these and the CLS token, where there is one; all but the first, whatever that is.
# The last is for MoE-LLaVA's 384 px checkpoints: it takes SigLIP's first patch for a CLS token and drops it.
SELECT_FEATURES = ("patch", "cls_patch", "drop_first")


@dataclass(kw_only=True)
class LlavaConfigMixin:
    """LLaVA's keys (LLaVA 1.5 `config.json`), with the defaults that an absent key means.

    mm_vision_tower: hub id or path of the tower. vision_config: the tower's own config (dict or object); where it is
    set, the tower's weights are in the checkpoint and loading looks nothing up. mm_image_size: side in pixels that the
    tower is fed, None for the tower's own. image_grid_pinpoints: resolutions (width, height) that `anyres` cuts
    pictures at, None for LLaVA-1.6's five at the tower's size; mm_patch_merge_type says how the features of the crops
    are joined, and with `unpad` in it there is a weight `model.image_newline`. image_token_index: placeholder in
    `input_ids`, -200 or a vocabulary id. moe: MoE-LLaVA's nested dict, None for a dense model. new_words: ids
    that the language model was not trained with, whose rows train in every stage until one trains the whole matrices.
    conv_template: the prompt format that trained the checkpoint; enable_thinking, chat_end_mark and
    special_tokens_in_text: what it chose beside, see PromptOptions. base_model_name_or_path: set only in a folder that
    holds what was trained and not the whole model.
    """

    # Not annotated, so that they are no fields. What transformers sets on a config it sets on these too.
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012
    # The placeholder under the name that transformers looks for.
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012

    mm_vision_tower: str | None = None
    vision_config: dict | PreTrainedConfig | None = None
    mm_hidden_size: int | None = None
    mm_image_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_projector_lr: float | None = None
    use_mm_proj: bool = True
    tune_mm_mlp_adapter: bool = False
    freeze_mm_mlp_adapter: bool = False
    unfreeze_mm_vision_tower: bool = False
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: list | str | None = None
    image_token_index: int = -200
    tokenizer_padding_side: str = "right"
    tokenizer_model_max_length: int | None = None
    conv_template: str | None = None
    enable_thinking: bool = False
    chat_end_mark: str | None = None
    special_tokens_in_text: str = "token"
    moe: dict | None = None
    new_words: list | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        """Turn `vision_config` into a config object and fill `mm_hidden_size` from it."""
        # Before the parent, which hands the choice of attention and the like on to it.
        if isinstance(self.vision_config, dict):
            self.vision_config = vision_config_from_dict(self.vision_config)
        super().__post_init__(**kwargs)
        if self.vision_config is not None and self.mm_hidden_size is None:
            self.mm_hidden_size = self.vision_config.hidden_size
        if self.mm_vision_select_feature not in SELECT_FEATURES:
            raise ValueError(
                f"unknown mm_vision_select_feature {self.mm_vision_select_feature!r}; "
                f"known: {', '.join(SELECT_FEATURES)}."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Return the fields of a config.json under our names, LLaVA's and MoE-LLaVA's among them, and what is left."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return own_fields(fields), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Return a config from the fields of a config.json, under our names or those of a format that we read."""
        return super().from_dict(own_fields(config_dict), **kwargs)

    @property
    def has_vision_tower(self) -> bool:
        """Whether the model sees pictures at all."""
        return self.vision_config is not None or self.mm_vision_tower is not None

    @property
    def num_image_tokens(self) -> int:
        """Return the number of features of one picture, or of one crop of it, 576 for CLIP-L/14 at 336 px."""
        return self.picture_layout.num_features

    @property
    def has_newline(self) -> bool:
        """Whether the model has a weight that closes rows of patches."""
        return self.has_vision_tower and "unpad" in self.mm_patch_merge_type

    @property
    def picture_layout(self) -> PictureLayout:
        """How a picture becomes crops and features; ValueError if the keys contradict each other."""
        vision = resolve_vision_config(self)
        crop_px = self.mm_image_size or vision.image_size
        side = crop_px // vision.patch_size
        num_features = side * side + has_class_token(vision) - drops_first(self.mm_vision_select_feature, vision)
        return PictureLayout.read(
            num_features, side, crop_px, self.image_aspect_ratio, self.mm_patch_merge_type, self.image_grid_pinpoints
        )


def own_fields(fields: dict) -> dict:
    """Return the fields of a config.json under our names."""
    foreign = foreign_format(fields)
    return fields if foreign is None else foreign.config_from(fields)


def has_class_token(vision_config: PreTrainedConfig) -> bool:
    """Tell whether the tower puts a CLS token before the patches; SigLIP does not."""
    return not vision_config.model_type.startswith("siglip")


def drops_first(select_feature: str, vision_config: PreTrainedConfig) -> bool:
    """Tell whether the first of a tower's tokens is left out."""
    return select_feature == "drop_first" or (select_feature == "patch" and has_class_token(vision_config))


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


@lru_cache(maxsize=16)
def load_vision_config(name: str, **hub) -> PreTrainedConfig:
    """Read the config of a tower by hub id or path; of a picture-and-text model the vision part."""
    check_source(name, "vision tower", VISION_TOWER, **hub)
    try:
        with in_words(name, **hub):
            config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise OSError(
            f"vision tower {name!r} could not be read ({str(error).splitlines()[0]}). Give a hub id such as "
            "openai/clip-vit-large-patch14-336, or a directory with config.json, preprocessor_config.json and weights."
        ) from error
    return getattr(config, "vision_config", config)
