"""The config keys that make a decoder's config a LLaVA one, and the config class of each decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from llava_lite.constants import with_todays_keys
from llava_lite.formats import foreign_format
from llava_lite.media.layout import ImageLayout
from llava_lite.tower_config import (
    SELECT_FEATURES,
    feature_width,
    num_tower_tokens,
    pixel_config,
    resolve_vision_config,
    vision_config_from_dict,
)

# How images enter the decoder; see mm_injection.
INJECTIONS = ("tokens", "adaption_prompt")
# The values of keys that have a few.
CHOICES = {
    "mm_vision_select_feature": SELECT_FEATURES,
    "mm_injection": INJECTIONS,
    "mm_text_only": ("bare", "blank"),
    "mm_image_position": ("placeholder", "front"),
    "mm_gate_norm": ("rms", "layer"),
    "image_channels": ("rgb", "bgr"),
}


@dataclass(kw_only=True)
class LlavaConfigMixin:
    """LLaVA's keys (LLaVA 1.5 `config.json`), with the defaults that an absent key means.

    The comment on a key says what it means; the reference of config keys is generated from these comments.
    """

    # Not annotated, so that they are no fields. What transformers sets on a config it sets on these too.
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012
    # The placeholder under the name that transformers looks for.
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012

    # Hub id or path of the vision tower; None, with no vision_config, for a model that reads text alone.
    mm_vision_tower: str | None = None
    # The vision tower's own config. Where it is set, the tower's weights are in the checkpoint, and mm_vision_tower is
    # not looked up.
    vision_config: dict | PreTrainedConfig | None = None
    # Width of the vision tower's features; None: that of vision_config.
    mm_hidden_size: int | None = None
    # Side in pixels of the images that the tower is given; None: the tower's own image_size.
    mm_image_size: int | None = None
    # Connector between vision tower and language model: identity, linear, linear_norm, mlpNx_gelu, gated_mlpNx (N
    # gated MLPs with residuals) or query_vit (learned queries that read the features).
    mm_projector_type: str = "linear"
    # Layer of the vision tower whose output is read; -2 is the last but one.
    mm_vision_select_layer: int = -2
    # Tokens of the tower that are read: patch, without the CLS token; cls_patch, all; drop_first, all but the first;
    # pooled, the CLS token alone.
    mm_vision_select_feature: str = "patch"
    # Apply CLIP's last norm and its projection into the space that it shares with text to the tokens that are read.
    mm_vision_projection: bool = False
    # How images enter the language model: tokens, in the sequence of embeddings; adaption_prompt, in the attention of
    # its last layers, as prompts that no token of the text stands for (LLaMA-Adapter).
    mm_injection: str = "tokens"
    # With mm_injection adaption_prompt: prompts of each layer; the connector makes as many vectors of an image.
    adaption_prompt_len: int = 10
    # With mm_injection adaption_prompt: number of layers with prompts, the last of the model; None: all.
    adaption_prompt_layers: int | None = None
    # With mm_injection adaption_prompt: a second, scalar gate in each of these layers, which some releases have.
    adaption_prompt_new_gate: bool = False
    # With mm_injection adaption_prompt: whether LoRA of the key and value projections applies to prompts too.
    adaption_prompt_lora: bool = False
    # With mm_injection adaption_prompt, what a text without an image gets: bare, the prompts alone; blank, the prompts
    # and an image of zeros.
    mm_text_only: str = "bare"
    # With mm_injection tokens: learned vectors model.image_start and model.image_end around the features of an image.
    mm_boundary_vectors: bool = False
    # With mm_injection tokens: where an image stands, at its placeholder or in front of all text, after the first
    # token.
    mm_image_position: str = "placeholder"
    # With mm_projector_type query_vit: number of queries, which is that of the vectors of an image.
    mm_query_len: int = 10
    # With mm_projector_type query_vit: width of its layers.
    mm_query_hidden: int = 768
    # With mm_projector_type query_vit: number of its layers.
    mm_query_depth: int = 8
    # With mm_projector_type query_vit: attention heads of a layer.
    mm_query_heads: int = 16
    # With mm_projector_type query_vit: width of an MLP as a multiple of mm_query_hidden.
    mm_query_mlp_ratio: float = 4.0
    # With mm_projector_type gated_mlpNx: width of an MLP as a multiple of the language model's width.
    mm_gate_expansion: int = 4
    # With mm_projector_type gated_mlpNx: the norms, rms or layer; with layer the MLPs have biases.
    mm_gate_norm: str = "rms"
    # Names of linear layers of the language model that have a bias which its architecture does not give them.
    decoder_bias: list | None = None
    # Order of the colours in the images that the tower was trained with: rgb, or bgr in LLaMA-Adapter V2's releases.
    image_channels: str = "rgb"
    # How the features of an image's crops are joined: flat, spatial or spatial_unpad. The last has a trained weight,
    # model.image_newline, after each row of patches.
    mm_patch_merge_type: str = "flat"
    # Put the tokens <im_start> and <im_end> around each image.
    mm_use_im_start_end: bool = False
    # The vocabulary has the token <im_patch>.
    mm_use_im_patch_token: bool = False
    # Learning rate of the connector in training; written for LLaVA's programs, not read.
    mm_projector_lr: float | None = None
    # Written for LLaVA's programs, not read.
    use_mm_proj: bool = True
    # Whether training was of the connector alone; written for LLaVA's programs, not read.
    tune_mm_mlp_adapter: bool = False
    # Whether training left the connector as it was; written for LLaVA's programs, not read.
    freeze_mm_mlp_adapter: bool = False
    # Whether the vision tower was trained: its weights are then read from the checkpoint, not from mm_vision_tower.
    unfreeze_mm_vision_tower: bool = False
    # How an image is made square: square, by cropping; pad, by padding; anyres, by cutting it into crops.
    image_aspect_ratio: str = "square"
    # Resolutions that anyres cuts an image at: [[width, height], ...] in pixels, or the text "(1x1),...,(6x6)" in
    # crops; None: LLaVA-1.6's five at the tower's size.
    image_grid_pinpoints: list | str | None = None
    # Placeholder of an image in input_ids: LLaVA's -200, or an id of the vocabulary.
    image_token_index: int = -200
    # Side on which the sequences of a batch are padded where images are placed by the model: right or left.
    tokenizer_padding_side: str = "right"
    # Longest sequence in tokens, image features included; longer ones with labels are truncated. None: no limit.
    tokenizer_model_max_length: int | None = None
    # Conversation template that the checkpoint was trained with, such as v1.
    conv_template: str | None = None
    # With conv_template chat: whether prompts ask the model to reason before it answers (Qwen3).
    enable_thinking: bool = False
    # With conv_template chat: the token that ends every answer, where the tokenizer's chat template writes none.
    chat_end_token: str | None = None
    # How a special token spelled out in a text is encoded: token, as that token; text, like any other text.
    special_tokens_in_text: str = "token"
    # Mixture of experts, a dict with MoE-LLaVA's keys; None for a dense model.
    moe: dict | None = None
    # Ids of tokens that the language model was not trained with. Their rows of both embedding matrices train in every
    # stage until one trains the complete matrices.
    new_words: list | None = None
    # Base model, in a checkpoint that holds only the weights that were trained.
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        """Turn `vision_config` into a config object and fill `mm_hidden_size` from it."""
        # Before the parent, which passes the choice of attention and the like on to it.
        if isinstance(self.vision_config, dict):
            self.vision_config = vision_config_from_dict(self.vision_config)
        super().__post_init__(**kwargs)
        if self.vision_config is not None and self.mm_hidden_size is None:
            self.mm_hidden_size = feature_width(self, self.vision_config)
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"unknown {key} {getattr(self, key)!r}; known: {', '.join(known)}.")
        self._check_injection()

    def _check_injection(self):
        if self.mm_injection == "tokens":
            return
        layers = self.adaption_prompt_layers
        if layers is not None and not 1 <= layers <= self.num_hidden_layers:
            raise ValueError(
                f"adaption_prompt_layers {layers} of a model of {self.num_hidden_layers} layers; give 1 to "
                f"{self.num_hidden_layers}."
            )
        if self.adaption_prompt_len < 1:
            raise ValueError(f"adaption_prompt_len is {self.adaption_prompt_len}; expected 1 or more.")
        if self.mm_boundary_vectors or self.mm_image_position != "placeholder":
            raise ValueError(
                "mm_boundary_vectors and mm_image_position belong to mm_injection tokens; with adaption_prompt no "
                "image stands in the text."
            )
        if self.image_aspect_ratio == "anyres" or "unpad" in self.mm_patch_merge_type:
            raise ValueError(
                "mm_injection adaption_prompt reads an image as a whole; image_aspect_ratio anyres and "
                f"mm_patch_merge_type {self.mm_patch_merge_type!r} need mm_injection tokens."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Return the fields of a config.json under our names, and the keywords that are left."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return own_fields(fields), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Return a config from the fields of a config.json, under our names or those of a format that we read."""
        return super().from_dict(own_fields(config_dict), **kwargs)

    @property
    def has_vision_tower(self) -> bool:
        """Whether the model sees images at all."""
        return self.vision_config is not None or self.mm_vision_tower is not None

    @property
    def has_prompts(self) -> bool:
        """Whether images, and learned prompts, enter the attention of the last layers."""
        return self.mm_injection == "adaption_prompt"

    @property
    def num_prompted_layers(self) -> int:
        """Return the number of layers with prompts, the last of the model; 0 with mm_injection tokens."""
        if not self.has_prompts:
            return 0
        return self.num_hidden_layers if self.adaption_prompt_layers is None else self.adaption_prompt_layers

    @property
    def num_image_tokens(self) -> int:
        """Return the number of features of one image, or of one crop of it, 576 for CLIP-L/14 at 336 px."""
        return self.image_layout.num_features

    @property
    def has_newline(self) -> bool:
        """Whether the model has a weight that ends each line of patches."""
        return self.has_vision_tower and "unpad" in self.mm_patch_merge_type

    @property
    def image_vectors(self) -> list[str]:
        """Return the names of the stack's learned vectors that stand among the features of an image."""
        if not self.has_vision_tower:
            return []
        around = ["image_start", "image_end"] if self.mm_boundary_vectors else []
        return (["image_newline"] if self.has_newline else []) + around

    @property
    def image_layout(self) -> ImageLayout:
        """How an image becomes crops and features; ValueError if the keys contradict each other."""
        vision = resolve_vision_config(self)
        crop_px = self.mm_image_size or pixel_config(vision).image_size
        side = crop_px // pixel_config(vision).patch_size
        layout = ImageLayout.read(
            self.count_features(num_tower_tokens(self, vision)),
            *(side, crop_px, self.image_aspect_ratio, self.mm_patch_merge_type, self.image_grid_pinpoints),
        )
        return replace(
            layout,
            in_text=not self.has_prompts,
            num_boundary=2 * self.mm_boundary_vectors,
            channels=self.image_channels,
            media=vision.media if vision.model_type == "imagebind" else (),
        )

    def count_features(self, num_tower_tokens: int) -> int:
        """Return the number of the connector's vectors of an image, or of a crop, of so many of the tower."""
        return self.mm_query_len if self.mm_projector_type == "query_vit" else num_tower_tokens


def own_fields(fields: dict) -> dict:
    """Return the fields of a config.json under our names."""
    foreign = foreign_format(fields)
    return with_todays_keys(fields) if foreign is None else foreign.config_from(fields)


def get_text_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a language model's config without those that name its class."""
    fields = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype"):
        fields.pop(key, None)
    return fields


class LlavaLlamaConfig(LlavaConfigMixin, LlamaConfig):
    """A Llama config with LLaVA's keys."""

    model_type = "llava_llama"


class LlavaMistralConfig(LlavaConfigMixin, MistralConfig):
    """A Mistral config with LLaVA's keys."""

    model_type = "llava_mistral"


class LlavaPhiConfig(LlavaConfigMixin, PhiConfig):
    """A Phi config with LLaVA's keys."""

    model_type = "llava_phi"


class LlavaQwen2Config(LlavaConfigMixin, Qwen2Config):
    """A Qwen2 config with LLaVA's keys."""

    model_type = "llava_qwen2"


class LlavaQwen3Config(LlavaConfigMixin, Qwen3Config):
    """A Qwen3 config with LLaVA's keys."""

    model_type = "llava_qwen3"


class LlavaStableLmConfig(LlavaConfigMixin, StableLmConfig):
    """A StableLM config with LLaVA's keys."""

    model_type = "llava_stablelm"


# Decoder -> config class.
CONFIGS = {
    "llama": LlavaLlamaConfig,
    "mistral": LlavaMistralConfig,
    "phi": LlavaPhiConfig,
    "qwen2": LlavaQwen2Config,
    "qwen3": LlavaQwen3Config,
    "stablelm": LlavaStableLmConfig,
}


def config_class_for(model_type: str) -> type:
    """Return the config class of a text decoder ("llama") or of a model of ours ("llava_llama").

    Raises ValueError with the known ones.
    """
    name = model_type.removeprefix("llava_")
    if name not in CONFIGS:
        raise ValueError(f"unknown language model of model_type {model_type!r}; known: {', '.join(sorted(CONFIGS))}.")
    return CONFIGS[name]
