"""Join a decoder of transformers with a vision tower and a connector: encode images, run the decoder, take the loss.

B batch, T tokens before images are expanded, L after, N images, P features of a crop of one, D model width,
S supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from llava_lite.hub.mixins import SharingMixin
from llava_lite.model.adaption_prompt import PromptedAttention, add_prompts, check_prompted, init_prompts
from llava_lite.model.attention import find_segments
from llava_lite.model.cached_images import (
    check_images_again,
    check_same_images,
    find_cache,
    image_mask,
    note_images,
    row_indices,
)
from llava_lite.model.compat.methods import LlavaNames, StackNames
from llava_lite.model.connector import build_connector
from llava_lite.model.connector.query_vit import QueryVit
from llava_lite.model.decoder_bias import add_biases
from llava_lite.model.encoders import VisionTower, build_vision_tower
from llava_lite.model.fusion.crops import unpad_image as unpad_image  # LLaVA imports it from here.
from llava_lite.model.fusion.encode import EmbeddingMixin
from llava_lite.model.fusion.image_features import ImageFeaturesMixin
from llava_lite.model.fusion.splice import Batch
from llava_lite.model.generation import ImageGeneration
from llava_lite.model.generation_config import SavingMixin
from llava_lite.model.lm_head import VocabularyHead
from llava_lite.model.loading import LoadingMixin, StackLoadingMixin
from llava_lite.model.loss import check_label_shape, find_supervised, supervised_loss
from llava_lite.model.moe.block import MoeBlock, RoutingContext, read_moe_config, use_routing
from llava_lite.model.moe.mixin import ExpertsMixin, RoutingMixin
from llava_lite.model.outputs import LlavaOutput


class LlavaMetaModel(
    PromptedAttention, StackNames, EmbeddingMixin, ImageFeaturesMixin, StackLoadingMixin, ExpertsMixin
):
    """The decoder stack with `vision_tower` and `mm_projector` beside `layers`; MoE blocks replace some MLPs."""

    def __init__(self, config):
        super().__init__(config)
        if config.has_prompts and self.prompted_layer is not None:
            self.layers = nn.ModuleList(self.prompted_layer(config, i) for i in range(config.num_hidden_layers))
        if config.has_vision_tower:
            self.vision_tower = build_vision_tower(config)
            if config.mm_hidden_size is None:
                config.mm_hidden_size = self.vision_tower.hidden_size
            self.mm_projector = build_connector(config)
        for name in config.image_vectors:
            setattr(self, name, nn.Parameter(torch.empty(config.hidden_size)))
        moe = read_moe_config(config.moe, config.num_hidden_layers)
        if moe is not None:
            for index, num_experts in zip(moe.layers, moe.num_experts, strict=True):
                self.layers[index].mlp = MoeBlock(config, moe, num_experts, self.layers[index].mlp, index)
        add_biases(self.layers, config.decoder_bias or ())
        if config.has_prompts:
            add_prompts(self, config)
        self.post_init()
        # transformers has initialised this module, not its parameters of ours, in the constructor of the decoder.
        self.draw_vectors()

    @torch.no_grad()
    def draw_vectors(self) -> None:
        """Draw the vectors around images and after rows of patches, with the spread of a token embedding (LLaVA)."""
        for name in self.config.image_vectors:
            init.normal_(getattr(self, name), std=self.config.hidden_size**-0.5)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.draw_vectors()
        if isinstance(module, QueryVit):
            module.draw()
        init_prompts(module)

    def get_vision_tower(self) -> VisionTower | None:
        """Return the tower, None in a text-only model."""
        return getattr(self, "vision_tower", None)

    get_image_tower = get_vision_tower

    def get_model(self):
        """Return the decoder stack, which is this module; the full model has the same method."""
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        images: torch.FloatTensor | list[torch.Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_features: torch.Tensor | None = None,
        image_rows: torch.LongTensor | None = None,
        visual_prompts: torch.FloatTensor | None = None,
        **kwargs,
    ):
        """Return the hidden states [B, L, D] of embeddings, or of ids and images as in the full model."""
        given = pixel_values if images is None else images
        if self.config.has_prompts:
            pass
        elif inputs_embeds is None and given is not None:
            batch = Batch(input_ids, attention_mask, position_ids)
            batch, inputs_embeds = self.embed_batch(batch, given, image_sizes)
            input_ids, attention_mask, position_ids = None, batch.attention_mask, batch.position_ids
        elif pixel_values is not None:
            inputs_embeds = self.write_images(inputs_embeds, pixel_values, image_sizes)
        num_rows = len(input_ids if inputs_embeds is None else inputs_embeds)
        if attention_mask is None and past_key_values is None and "cu_seq_lens_q" not in kwargs:
            kwargs |= find_segments(position_ids, num_rows)
        if self.config.has_prompts:
            num_samples = len(kwargs["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in kwargs else num_rows
            check_prompted(self.config)
            has_image = (True,) * num_samples
            if visual_prompts is None:
                rows, shown = row_indices(image_rows), given if image_features is None else image_features
                visual_prompts = self.visual_prompts(num_samples, given, image_features, rows)
                has_image = image_mask(num_samples, shown, rows)
                check_images_again(past_key_values, has_image)
            if not torch.compiler.is_compiling():
                check_same_images(past_key_values, visual_prompts)
            kwargs["adaption_prompts"] = self.adaption_prompt(visual_prompts)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            # With a cache transformers would attend across the samples of a packed row.
            use_cache=False if "cu_seq_lens_q" in kwargs else use_cache,
            **kwargs,
        )
        if self.config.has_prompts and not torch.compiler.is_compiling():
            note_images(find_cache(output), has_image, visual_prompts)
        return output


class LlavaMetaForCausalLM(
    PromptedAttention,
    LlavaNames,
    ImageGeneration,
    EmbeddingMixin,
    ImageFeaturesMixin,
    SharingMixin,
    SavingMixin,
    LoadingMixin,
    RoutingMixin,
    ExpertsMixin,
):
    """The full model: a decoder stack and a vocabulary head; a backbone names its `decoder_class`."""

    decoder_class: type
    lm_head_bias = False
    # The loss is divided by num_items_in_batch here, so the Trainer must not divide it again.
    accepts_loss_kwargs = True
    # See plain_paths.py.
    plain_paths: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "decoder_class" in vars(cls):
            cls.decoder_class.whole_class = cls

    def __init__(self, config):
        # Not the backbone's own constructor, which would build a stack and a head without images.
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size, bias=self.lm_head_bias)
        self.post_init()

    def get_model(self):
        """Return the decoder stack (LLaVA's name)."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """Return the tower, None in a text-only model."""
        return self.model.get_vision_tower()

    get_image_tower = get_vision_tower

    def set_output_embeddings(self, new_embeddings):
        """Replace the head; a plain linear layer, as resizing makes it, becomes a VocabularyHead."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings = VocabularyHead.sharing(new_embeddings, like=self.lm_head)
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: torch.FloatTensor | list[torch.Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache_position: torch.LongTensor | None = None,
        image_features: torch.Tensor | list[torch.Tensor] | None = None,
        image_rows: torch.LongTensor | None = None,
        visual_prompts: torch.FloatTensor | None = None,
        supervised_positions: torch.LongTensor | None = None,
        routing: RoutingContext | None = None,
        **kwargs,
    ) -> LlavaOutput | tuple:
        """Return loss and logits of token ids [B, T] with placeholders for images [N, 3, H, W].

        input_ids: one placeholder an image or one a feature; config.image_token_index or -200.
        images, pixel_values: two names for the images of the batch, in reading order; see encode_each_image.
        image_sizes: (width, height) of each image, for any-resolution images; see encode_each_image.
        image_features: the tower's features in place of images, [N, P, C] or a list of [n, P, C].
        image_rows, visual_prompts: with mm_injection adaption_prompt, see `visual_prompts`; the ids have no
            placeholders then. image_rows may also be a mask [B] of the sequences that have an image.
        inputs_embeds: [B, L, D] in place of ids. They contain the `images` already, as in LLaVA; `pixel_values` are
            written where the placeholder's embedding stands, as in transformers.
        labels: [B, T], IGNORE_INDEX at unsupervised tokens. shift_labels: [B, L] in their place, each label at the
            position that predicts it, as sequence parallelism cuts them.
        supervised_positions: [S] flat positions whose next token is supervised, if the collator has computed them
            for ids that need no expanding.
        num_items_in_batch: supervised tokens of the optimizer step, the divisor of the loss; else those of this batch.
        past_key_values: with a cache, attention_mask may cover the cached positions too.
        Samples packed in one row [1, L] have position_ids from 0 each, cu_seq_lens_q and max_length_q, and no
        attention_mask; see attention.py. routing: filled with the record of the MoE layers, for the caller.
        Raises ValueError when placeholders and images do not match.
        """
        # Not in the signature: transformers' Trainer computes an evaluation's loss only for batches that have every
        # argument with `label` in its name, and most have `labels` alone.
        shift_labels = kwargs.pop("shift_labels", None)
        batch = Batch(input_ids, attention_mask, position_ids, labels)
        batch, inputs_embeds = self.embed_inputs(
            batch, inputs_embeds, images, pixel_values, image_sizes, image_features
        )
        if self.config.has_prompts:
            given = pixel_values if images is None else images
            kwargs |= {"images": given, "image_features": image_features, "image_rows": image_rows}
            kwargs["visual_prompts"] = visual_prompts
        has_labels = batch.labels is not None or shift_labels is not None
        routing = self.prepare_routing(routing, batch.attention_mask, has_labels)
        with use_routing(routing):
            outputs = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **drop_none(output_attentions=output_attentions, output_hidden_states=output_hidden_states),
                **drop_none(cache_position=cache_position),
                **kwargs,
            )
        hidden = outputs.last_hidden_state  # [B, L, D]
        logits = lm_loss = None
        # In training the head runs at supervised positions alone: in stage 1 at about 20 of 600.
        if not (has_labels and self.training):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if has_labels:
            # Expanded sequences have other positions than the collator saw.
            positions = supervised_positions if batch.labels is labels else None
            lm_loss = self.supervised_loss(hidden, batch.labels, shift_labels, positions, num_items_in_batch)
        loss, moe_loss, moe_loss_list = self.add_balance_loss(lm_loss, routing)
        output = LlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            moe_loss=moe_loss,
            moe_loss_list=moe_loss_list,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output.to_tuple() if return_dict is False else output

    def supervised_loss(self, hidden, labels, shift_labels=None, positions=None, num_items=None) -> torch.Tensor:
        """Return the cross-entropy of hidden states [B, L, D] at supervised positions, over num_items or their number.

        Arguments as in find_supervised.
        """
        check_label_shape(shift_labels, hidden)
        positions, targets = find_supervised(labels, shift_labels, positions)
        hidden = hidden.flatten(0, 1)  # [B * L, D]
        return supervised_loss(self.lm_head, hidden, targets, positions, num_items, "loss" in self.plain_paths)


def drop_none(**kwargs) -> dict:
    """Return the arguments that are set."""
    return {k: v for k, v in kwargs.items() if v is not None}
