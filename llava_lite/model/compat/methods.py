"""LLaVA's and MoE-LLaVA's methods of a model, for code that prepares inputs or builds a model step by step.

B batch, T tokens before images are expanded, L after, D model width.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch

from llava_lite.checkpoints.copying import gathered, read_weights
from llava_lite.checkpoints.partial import fill_connector
from llava_lite.checkpoints.vocabulary import fit_rows, load_rows
from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, IGNORE_INDEX
from llava_lite.model.connector import build_connector
from llava_lite.model.encoders import build_vision_tower
from llava_lite.model.fusion.splice import Batch, placeholder_mask, positions_from_mask
from llava_lite.model.moe.config import MoeConfig
from llava_lite.model.moe.upcycle import upcycle
from llava_lite.tower_config import feature_width, get_tower_fields

logger = logging.getLogger(__name__)


class StackNames:
    """LLaVA's methods of `get_model()`, the decoder stack."""

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Add the tower and the connector that `model_args` describe to a plain decoder, or configure its own.

        model_args: vision_tower, mm_vision_select_layer, mm_vision_select_feature, mm_projector_type,
        mm_patch_merge_type and pretrain_mm_mlp_adapter, LLaVA's flags (image_tower and image_projector_type are
        MoE-LLaVA's names for two). The connector is trainable afterwards. fsdp: accepted and not needed.
        """
        given = read_vision_args(model_args)
        if getattr(model_args, "video_tower", None) is not None:
            raise ValueError(f"model_args.video_tower is {model_args.video_tower!r}; there are no video towers here.")
        if given.vision_tower is None:
            raise ValueError("model_args.vision_tower is None; name one such as openai/clip-vit-large-patch14-336.")
        for name, value in given.config.items():
            setattr(self.config, name, value)
        if self.get_vision_tower() is None:
            for name, value in get_tower_fields(given.vision_tower).items():
                setattr(self.config, name, value)
            self.config.mm_hidden_size = feature_width(self.config, self.config.vision_config)
            tower = build_vision_tower(self.config)
            tower.load_pretrained(given.vision_tower)
            self.vision_tower = tower.requires_grad_(False).to(self.device, self.dtype)
        self.vision_tower.read(self.config.mm_vision_select_layer, self.config.mm_vision_select_feature)
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_connector(self.config).to(self.device, self.dtype)
            self.add_newline()
        self.mm_projector.requires_grad_(True)
        if given.adapter is not None:
            fill_connector(self.mm_projector, given.adapter)
            self.fill_newline(given.adapter)

    def add_newline(self) -> None:
        """Draw the vector after each row of patches, if the config has one."""
        if self.config.has_newline:
            drawn = torch.randn(self.config.hidden_size, dtype=self.dtype, device=self.device)
            self.image_newline = torch.nn.Parameter(drawn * self.config.hidden_size**-0.5)

    def fill_newline(self, path) -> None:
        """Load the newline from a file of connector weights, if the model and the file have one."""
        saved = [weight for name, weight in read_weights(path).items() if name.endswith("image_newline")]
        if saved and self.config.has_newline:
            with torch.no_grad(), gathered([self.image_newline], modify=True):
                if self.image_newline.numel():
                    self.image_newline.copy_(saved[0])


class LlavaNames:
    """LLaVA's and MoE-LLaVA's methods of the full model."""

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Return (None, position_ids, attention_mask, past_key_values, inputs_embeds [B, L, D], labels [B, L]).

        input_ids: [B, T], -200 for each image; arguments that are None stay None. Sequences are cut at
        config.tokenizer_model_max_length and padded with zeros on config.tokenizer_padding_side. Without a tower,
        without `images`, and in a decode step (T is 1) nothing changes, and inputs_embeds is None.
        """
        if self.config.has_prompts and images is not None:
            raise ValueError(
                "with mm_injection adaption_prompt images are in no embeddings; give them to forward or generate as "
                "images=."
            )
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        config = self.config
        if not placeholder_mask(input_ids, config.image_token_index).any():
            # LLaVA's batches have an empty image for each sequence of text alone.
            images = None
        batch, embeds = self.embed_batch(Batch(input_ids, attention_mask, position_ids, labels), images, image_sizes)
        kept, source = cut_and_pad(
            torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask,
            config.tokenizer_model_max_length,
            pad_left=config.tokenizer_padding_side == "left",
        )  # [B, L] each
        embeds = embeds.gather(1, source[..., None].expand(-1, -1, embeds.shape[2]))
        embeds = embeds.masked_fill(~kept[..., None], 0)
        if labels is not None:
            labels = batch.labels.gather(1, source).masked_fill(~kept, IGNORE_INDEX)
        if attention_mask is not None:
            attention_mask = kept.to(attention_mask.dtype)
        if position_ids is not None:
            position_ids = positions_from_mask(kept).to(position_ids.dtype)
        return None, position_ids, attention_mask, past_key_values, embeds, labels

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Add tower and connector to the decoder stack; LLaVA calls this on `get_model()`."""
        self.get_model().initialize_vision_modules(model_args, fsdp)

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the image tokens that `model_args` names to the tokenizer and to the model's vocabulary.

        mm_use_im_patch_token, mm_use_im_start_end: which tokens. New rows are the mean of the old ones, or those of
        the adapter file if it has embeddings. tune_mm_mlp_adapter: with start and end tokens the input embeddings
        train and the output embeddings do not; without them neither does. Vocabulary matrices never shrink.
        """
        patch = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        start_end = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if model_args.mm_use_im_start_end else []
        num_known = min(len(tokenizer), self.config.vocab_size)
        tokenizer.add_tokens(patch + start_end, special_tokens=True)
        fit_rows(self, len(tokenizer), num_known)
        if model_args.tune_mm_mlp_adapter and (patch or start_end):
            self.get_input_embeddings().requires_grad_(bool(start_end))
            self.get_output_embeddings().requires_grad_(False)
        if start_end and model_args.pretrain_mm_mlp_adapter:
            ids = tokenizer.convert_tokens_to_ids(start_end)
            load_rows(self, ids, model_args.pretrain_mm_mlp_adapter)

    def initialize_moe_modules(self, model_args) -> None:
        """Replace MLPs by experts that are copies of them, as `model_args` (MoE-LLaVA's flags) describes.

        train_modules: parts of names that stay trainable; all else but the routers is frozen. None freezes nothing.
        """
        entries = model_args.train_modules
        if entries:
            for name, param in self.named_parameters():
                param.requires_grad_(any(entry in name for entry in entries))
        mlps = {i: any(p.requires_grad for p in layer.mlp.parameters()) for i, layer in enumerate(self.model.layers)}
        upcycle(self, read_moe_args(model_args))
        for layer, block in self.moe_layers().items():
            block.experts.requires_grad_(mlps[layer])


def read_vision_args(model_args) -> SimpleNamespace:
    """Return (vision_tower, adapter, config): the tower's name, the file of connector weights, the config keys."""

    def first(*names):
        return next((getattr(model_args, name) for name in names if getattr(model_args, name, None) is not None), None)

    given = {
        "mm_vision_tower": first("vision_tower", "image_tower"),
        "use_mm_proj": True,
        "mm_projector_type": first("mm_projector_type", "image_projector_type"),
        "mm_vision_select_layer": first("mm_vision_select_layer"),
        "mm_vision_select_feature": first("mm_vision_select_feature"),
        "mm_patch_merge_type": first("mm_patch_merge_type"),
    }
    config = {name: value for name, value in given.items() if value is not None}
    return SimpleNamespace(
        vision_tower=given["mm_vision_tower"], adapter=first("pretrain_mm_mlp_adapter"), config=config
    )


def read_moe_args(model_args) -> dict:
    """Return the dict for `config.moe` of our ModelArguments, or of an object with MoE-LLaVA's fields."""
    if hasattr(model_args, "moe_config"):
        return model_args.moe_config()
    names = set(MoeConfig.__dataclass_fields__) - {"layers"}
    return {name: getattr(model_args, name) for name in sorted(names) if hasattr(model_args, name)}


def cut_and_pad(mask, max_length, pad_left):
    """Return (kept [B, L] bool, source [B, L]): the tokens of cut and padded sequences, and where each comes from.

    mask: [B, T], 1 at real tokens, with padding on any side. max_length: tokens of a sequence, None for all.
    """
    counts = mask.bool().sum(1, keepdim=True)  # [B, 1]
    if max_length is not None:
        counts = counts.clamp(max=max_length)
    length = int(counts.max())
    columns = torch.arange(length, device=mask.device) - (length - counts if pad_left else 0)  # [B or 1, L]
    kept = (columns >= 0) & (columns < counts)
    # Stable, so that the real tokens come first and in order.
    order = torch.argsort(mask.bool().int(), dim=1, descending=True, stable=True)
    return kept, order.gather(1, columns.clamp(min=0).expand_as(kept))


def without_empty_images(is_image, images, image_sizes=None):
    """Return (images, image_sizes) without the extra images that LLaVA's batches have for sequences of text alone.

    is_image: [B, T] bool, one placeholder an image. LLaVA's collator adds an image of zeros for each text-only
    sequence, in order. Returned unchanged unless there is exactly one extra image per text-only sequence; unchanged
    too without any placeholder where the images are not empty: then the placeholders were forgotten.
    """
    counts = is_image.sum(1).tolist()
    if images is None or 0 not in counts or len(images) != sum(counts) + counts.count(0):
        return images, image_sizes
    is_used = [used for count in counts for used in ([True] * count or [False])]
    if any(bool(image.any()) for image, used in zip(images, is_used, strict=True) if not used):
        if not any(is_used):
            return images, image_sizes
        logger.warning("an image was given for a sequence without <image>; it is ignored, as in LLaVA.")
    kept = [i for i, used in enumerate(is_used) if used]
    if not kept:
        return None, None
    sizes = None if image_sizes is None else [image_sizes[i] for i in kept]
    return (images[kept] if isinstance(images, torch.Tensor) else [images[i] for i in kept]), sizes
