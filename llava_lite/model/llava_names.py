"""LLaVA's and MoE-LLaVA's methods of a model, for code that prepares inputs or builds a model step by step.

B batch, T tokens before the splice, L after, D model width.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch

from llava_lite.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
)
from llava_lite.model.connector import build_connector
from llava_lite.model.moe_config import MoeConfig
from llava_lite.model.splice import Batch, placeholder_mask, positions_from_mask
from llava_lite.model.upcycle import upcycle
from llava_lite.model.vision_tower import build_vision_tower
from llava_lite.model.vocabulary import fit_rows, load_rows
from llava_lite.model.weights import gathered, read_weights

logger = logging.getLogger(__name__)


class StackNames:
    """What LLaVA calls on `get_model()`, the decoder stack."""

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Give a plain decoder the tower and the connector that `model_args` describe, or take up those it has.

        model_args: vision_tower, mm_vision_select_layer, mm_vision_select_feature, mm_projector_type,
        mm_patch_merge_type and pretrain_mm_mlp_adapter, LLaVA's flags (image_tower and image_projector_type are
        MoE-LLaVA's names of two). The connector is trained from here on. fsdp: accepted and not needed.
        """
        from llava_lite.model.assemble import fill_connector, tower_fields

        given = read_vision_args(model_args)
        if getattr(model_args, "video_tower", None) is not None:
            raise ValueError(f"model_args.video_tower is {model_args.video_tower!r}; there are no video towers here.")
        if given.vision_tower is None:
            raise ValueError("model_args.vision_tower is None; name one such as openai/clip-vit-large-patch14-336.")
        for name, value in given.config.items():
            setattr(self.config, name, value)
        if self.get_vision_tower() is None:
            for name, value in tower_fields(given.vision_tower).items():
                setattr(self.config, name, value)
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
        """Draw the vector that closes rows of patches, if the config asks for one."""
        if self.config.has_newline:
            drawn = torch.randn(self.config.hidden_size, dtype=self.dtype, device=self.device)
            self.image_newline = torch.nn.Parameter(drawn * self.config.hidden_size**-0.5)

    def fill_newline(self, path) -> None:
        """Copy the newline out of a file of connector weights, where the model has one and the file holds it."""
        saved = [weight for name, weight in read_weights(path).items() if name.endswith("image_newline")]
        if saved and self.config.has_newline:
            with torch.no_grad(), gathered([self.image_newline], modify=True):
                if self.image_newline.numel():
                    self.image_newline.copy_(saved[0])


class LlavaNames:
    """What LLaVA and MoE-LLaVA call on the model itself."""

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Return (None, position_ids, attention_mask, past_key_values, inputs_embeds [B, L, D], labels [B, L]).

        input_ids: [B, T], -200 for each picture; what is None stays None. Rows are cut at
        config.tokenizer_model_max_length and padded with zeros on config.tokenizer_padding_side. Nothing changes, and
        inputs_embeds is None, without a tower, without `images`, or where T is 1: a step of decoding.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        config = self.config
        if not placeholder_mask(input_ids, config.image_token_index).any():
            # LLaVA's rows of text alone come with a picture each, which is not looked at.
            images = None
        batch, embeds = self.embed_batch(Batch(input_ids, attention_mask, position_ids, labels), images, image_sizes)
        kept, source = rows_cut_and_padded(
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
        """Give the decoder stack its tower and connector; LLaVA calls this on `get_model()`."""
        self.get_model().initialize_vision_modules(model_args, fsdp)

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Teach tokenizer and model the words around and for pictures that `model_args` asks for.

        mm_use_im_patch_token, mm_use_im_start_end: which. New rows are the mean of the old ones, or those of the
        adapter file if it holds embeddings. tune_mm_mlp_adapter: with start and end marks the input embeddings train,
        the output embeddings do not; without them neither does. Vocabulary matrices never shrink.
        """
        words = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        marks = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if model_args.mm_use_im_start_end else []
        num_known = min(len(tokenizer), self.config.vocab_size)
        tokenizer.add_tokens(words + marks, special_tokens=True)
        fit_rows(self, len(tokenizer), num_known)
        if model_args.tune_mm_mlp_adapter and (words or marks):
            self.get_input_embeddings().requires_grad_(bool(marks))
            self.get_output_embeddings().requires_grad_(False)
        if marks and model_args.pretrain_mm_mlp_adapter:
            ids = tokenizer.convert_tokens_to_ids(marks)
            load_rows(self, ids, model_args.pretrain_mm_mlp_adapter)

    def initialize_moe_modules(self, model_args) -> None:
        """Turn MLPs into experts that answer the same, as `model_args` (MoE-LLaVA's flags) says.

        train_modules: parts of names that stay trained, all else is frozen but the routers; None freezes nothing.
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
    """Return (vision_tower, adapter, config): the tower's name, the file of connector weights, config keys by name."""

    def first(*names):
        return next((getattr(model_args, name) for name in names if getattr(model_args, name, None) is not None), None)

    asked = {
        "mm_vision_tower": first("vision_tower", "image_tower"),
        "use_mm_proj": True,
        "mm_projector_type": first("mm_projector_type", "image_projector_type"),
        "mm_vision_select_layer": first("mm_vision_select_layer"),
        "mm_vision_select_feature": first("mm_vision_select_feature"),
        "mm_patch_merge_type": first("mm_patch_merge_type"),
    }
    config = {name: value for name, value in asked.items() if value is not None}
    return SimpleNamespace(
        vision_tower=asked["mm_vision_tower"], adapter=first("pretrain_mm_mlp_adapter"), config=config
    )


def read_moe_args(model_args) -> dict:
    """Return the dict for `config.moe` of our ModelArguments, or of an object with MoE-LLaVA's fields."""
    if hasattr(model_args, "moe_config"):
        return model_args.moe_config()
    names = set(MoeConfig.__dataclass_fields__) - {"layers"}
    return {name: getattr(model_args, name) for name in sorted(names) if hasattr(model_args, name)}


def rows_cut_and_padded(mask, max_length, pad_left):
    """Return (kept [B, L] bool, source [B, L]): where a token stands once rows are cut and padded, and which one.

    mask: [B, T], 1 where a token is real, wherever its padding stands. max_length: tokens of a row, None for all.
    """
    counts = mask.bool().sum(1, keepdim=True)  # [B, 1]
    if max_length is not None:
        counts = counts.clamp(max=max_length)
    length = int(counts.max())
    columns = torch.arange(length, device=mask.device) - (length - counts if pad_left else 0)  # [B or 1, L]
    kept = (columns >= 0) & (columns < counts)
    # Stable, so that the real tokens of a row come first and in order.
    order = torch.argsort(mask.bool().int(), dim=1, descending=True, stable=True)
    return kept, order.gather(1, columns.clamp(min=0).expand_as(kept))


def without_blanks(is_picture, images, image_sizes=None):
    """Return (images, image_sizes) without the pictures that LLaVA's batches carry for rows of text alone.

    is_picture: [B, T] bool, one place a picture. There is one more picture for each of these rows, in their order;
    LLaVA's collator makes it of zeros. Where pictures and places do not add up so, nothing changes, nor does it if no
    row has a place and the pictures are real ones: somebody forgot the marks.
    """
    places = is_picture.sum(1).tolist()
    if images is None or 0 not in places or len(images) != sum(places) + places.count(0):
        return images, image_sizes
    is_seen = [seen for count in places for seen in ([True] * count or [False])]
    if any(bool(picture.any()) for picture, seen in zip(images, is_seen, strict=True) if not seen):
        if not any(is_seen):
            return images, image_sizes
        logger.warning("a picture was given for a row without <image>; it is not looked at, as in LLaVA.")
    kept = [i for i, seen in enumerate(is_seen) if seen]
    if not kept:
        return None, None
    sizes = None if image_sizes is None else [image_sizes[i] for i in kept]
    return (images[kept] if isinstance(images, torch.Tensor) else [images[i] for i in kept]), sizes
