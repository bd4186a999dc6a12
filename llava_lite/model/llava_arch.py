"""Join a stock decoder with a vision tower and a connector: encode pictures, forward, generate.

B batch, T tokens before the splice, L after, N pictures, P features of a crop of one, F of all, D model width,
V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from llava_lite.model.attention import find_segments
from llava_lite.model.connector import build_connector
from llava_lite.model.crops import unpad_image as unpad_image  # LLaVA's place for it
from llava_lite.model.embedding import EmbeddingMixin
from llava_lite.model.experts import OWN
from llava_lite.model.generation import PictureGeneration
from llava_lite.model.image_features import ImageFeaturesMixin
from llava_lite.model.llava_names import LlavaNames, StackNames
from llava_lite.model.loading import LoadingMixin, StackLoadingMixin
from llava_lite.model.moe import (
    MoeBlock,
    RoutingContext,
    checkpoint_with_routing,
    init_moe_weights,
    read_moe_config,
    use_routing,
)
from llava_lite.model.outputs import LlavaOutput
from llava_lite.model.sharing import SharingMixin
from llava_lite.model.splice import Batch
from llava_lite.model.supervision import find_supervised, refuse_other_shape, supervised_loss
from llava_lite.model.vision_tower import VisionTower, build_vision_tower
from llava_lite.model.vocabulary_head import VocabularyHead


class OfAnInstance:
    """Answer yes when a model is asked, no when its class is: only a model can tell whether it has experts."""

    def __get__(self, model, owner):
        """Return what is called as `model._can_set_experts_implementation()`."""
        return lambda: model is not None


class ExpertsMixin:
    """What transformers must know of a class whose layers may hold experts: the stack and the whole model alike."""

    # transformers looks for its decorator in the model's own file, does not find it there and refuses grouped experts.
    _can_set_experts_implementation = OfAnInstance()

    def get_correct_experts_implementation(self, requested_experts):
        """Return the name of what runs the experts: our own function unless another is asked for."""
        return super().get_correct_experts_implementation(requested_experts or OWN)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Raw 3-D expert weights are unknown to transformers' own initialisation, and so is a parameter beside modules.
        init_moe_weights(module, self.config.initializer_range)
        if isinstance(module, LlavaMetaModel) and module.config.has_newline:
            # As wide as a token embedding usually is (LLaVA).
            init.normal_(module.image_newline, std=module.config.hidden_size**-0.5)


class LlavaMetaModel(StackNames, EmbeddingMixin, ImageFeaturesMixin, StackLoadingMixin, ExpertsMixin):
    """The decoder stack with `vision_tower` and `mm_projector` beside `layers`; MoE blocks replace some MLPs."""

    def __init__(self, config):
        super().__init__(config)
        if config.has_vision_tower:
            self.vision_tower = build_vision_tower(config)
            if config.mm_hidden_size is None:
                config.mm_hidden_size = self.vision_tower.hidden_size
            self.mm_projector = build_connector(config)
        if config.has_newline:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))
            # The stock constructor has marked this module as drawn.
            self._is_hf_initialized = False
        moe = read_moe_config(config.moe, config.num_hidden_layers)
        if moe is not None:
            for index, num_experts in zip(moe.layers, moe.num_experts, strict=True):
                self.layers[index].mlp = MoeBlock(config, moe, num_experts, self.layers[index].mlp, index)
        self.post_init()

    def get_vision_tower(self) -> VisionTower | None:
        """Return the tower, None in a text-only model."""
        return getattr(self, "vision_tower", None)

    get_image_tower = get_vision_tower

    def get_model(self):
        """Return the decoder stack, which is this: what a whole model is asked can be asked here too."""
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
        **kwargs,
    ):
        """Return the hidden states of embeddings [B, L, D], or of ids and pictures as in the whole model."""
        images = images if images is not None else pixel_values
        if images is not None and inputs_embeds is None:
            batch = Batch(input_ids, attention_mask, position_ids)
            batch, inputs_embeds = self.embed_batch(batch, images, image_sizes)
            input_ids, attention_mask, position_ids = None, batch.attention_mask, batch.position_ids
        elif pixel_values is not None:
            inputs_embeds = self.write_pictures(inputs_embeds, pixel_values, image_sizes)
        if attention_mask is None and past_key_values is None and "cu_seq_lens_q" not in kwargs:
            kwargs |= find_segments(position_ids, len(input_ids if inputs_embeds is None else inputs_embeds))
        if "cu_seq_lens_q" in kwargs:
            # With a cache transformers would look across the samples of a row.
            use_cache = False
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class LlavaMetaForCausalLM(
    LlavaNames, PictureGeneration, EmbeddingMixin, ImageFeaturesMixin, SharingMixin, LoadingMixin, ExpertsMixin
):
    """Everything that LLaVA adds to a decoder with a vocabulary head; a backbone names its `decoder_class`."""

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
        """Put another layer in the head's place; a plain one, as resizing makes it, becomes a VocabularyHead."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings = VocabularyHead.of(new_embeddings, self.plain_paths)
        self.lm_head = new_embeddings

    def moe_layers(self) -> dict[int, MoeBlock]:
        """Return the MoE blocks by layer index; empty in a dense model."""
        return {i: layer.mlp for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoeBlock)}

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
        supervised_positions: torch.LongTensor | None = None,
        routing: RoutingContext | None = None,
        **kwargs,
    ) -> LlavaOutput | tuple:
        """Return loss and logits of token ids [B, T] in which placeholders stand for pictures [N, 3, H, W].

        input_ids: one placeholder a picture or one a feature; config.image_token_index or -200. images, pixel_values:
        two names for the pictures of the whole batch, in reading order. labels: [B, T], IGNORE_INDEX where nothing
        is learned. num_items_in_batch: supervised tokens of the whole optimizer step, the divisor of the loss (else
        those of this batch). image_sizes: (width, height) of each picture, read under any-resolution only, where a
        picture is several crops: see encode_pictures. inputs_embeds: [B, L, D] in place of ids; `images` are then in
        them already, as in LLaVA, and `pixel_values` go where the placeholder's embedding stands, as in transformers.
        shift_labels: [B, L], labels that stand at the position that predicts them, as sequence parallelism cuts them;
        they replace `labels`. supervised_positions: [S] flat positions whose next token is learned, if the collator
        has found them in ids that need no expanding. In training there are no logits: the head runs at those positions
        alone (in stage 1 about 20 of 600). Samples packed in one row [1, L] have position_ids from 0 each,
        cu_seq_lens_q and max_length_q (see attention.py), and no attention_mask. past_key_values: with a cache
        attention_mask may cover the cached positions too. image_features: what the tower made of the pictures before,
        in place of them: [N, P, C] or a list of [n, P, C]. routing: filled with what the MoE layers do in this call,
        for a caller who reads it afterwards. Raises ValueError when placeholders and pictures do not match.
        """
        # Out of the signature: transformers' Trainer tells an evaluation's loss of batches that have every name in it
        # with `label` in it, and most have `labels` alone.
        shift_labels = kwargs.pop("shift_labels", None)
        batch = Batch(input_ids, attention_mask, position_ids, labels)
        if inputs_embeds is None:
            images = images if images is not None else pixel_values
            batch, inputs_embeds = self.embed_batch(batch, images, image_sizes, image_features=image_features)
        elif pixel_values is not None:
            inputs_embeds = self.write_pictures(inputs_embeds, pixel_values, image_sizes)
        learns = batch.labels is not None or shift_labels is not None
        routing = self.prepare_routing(routing, batch.attention_mask, learns)
        with use_routing(routing):
            outputs = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **drop_none(
                    output_attentions=output_attentions,
                    output_hidden_states=output_hidden_states,
                    cache_position=cache_position,
                ),
                **kwargs,
            )
        hidden = outputs.last_hidden_state  # [B, L, D]
        logits = lm_loss = None
        if not learns or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if learns:
            refuse_other_shape(shift_labels, inputs_embeds)
            # Another tensor, maybe of the same shape: rows grow, lose padding and are cut. shift_labels may be a part.
            is_other = batch.labels is not labels or shift_labels is not None
            found = None if is_other else supervised_positions
            positions, targets = find_supervised(batch.labels, shift_labels, found)
            lm_loss = self.supervised_loss(hidden.flatten(0, 1), targets, positions, num_items_in_batch)
        loss, moe_loss, moe_losses = self.add_balance_loss(lm_loss, routing)
        output = LlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            moe_loss=moe_loss,
            moe_loss_list=moe_losses,
        )
        wants_tuple = self.config.return_dict is False if return_dict is None else not return_dict
        return output.to_tuple() if wants_tuple else output

    def supervised_loss(self, hidden: torch.Tensor, targets: torch.Tensor, positions=None, num_items=None):
        """Return the cross-entropy of hidden states [S, D], or of `positions` [S] of them; see supervision.py."""
        return supervised_loss(self.lm_head, hidden, targets, positions, num_items, "loss" in self.plain_paths)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Refuse what would take the gradient of the balance loss away in silence; else as transformers does."""
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant") and self.moe_layers():
            raise ValueError(
                "this model has experts, whose balance loss gets no gradient from reentrant checkpointing; "
                'give gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        # Whether there are experts or not: they may come later.
        gradient_checkpointing_func = partial(checkpoint_with_routing, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def prepare_routing(self, routing, attention_mask, learns: bool) -> RoutingContext | None:
        """Return the context that this call's MoE layers share: `routing` if one is given; None in a dense model.

        attention_mask: [B, L or more]; one of another shape says nothing about which positions are padding.
        """
        if not self.moe_layers():
            return None
        if routing is None:
            if torch.compiler.is_compiling() and not self.training and not learns:
                # Nothing reads it; see MoeBlock.forward.
                return None
            routing = RoutingContext()
        is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        routing.start(attention_mask if is_padding_mask else None, self.training)
        return routing

    def add_balance_loss(self, lm_loss, routing):
        """Return (loss, moe_loss, per-layer terms); MoE-LLaVA adds the weighted sum over layers to the loss."""
        if routing is None or lm_loss is None:
            return lm_loss, None, None
        terms = tuple(routing.balance_losses())
        moe = read_moe_config(self.config.moe, self.config.num_hidden_layers)
        moe_loss = moe.router_aux_loss_coef * torch.stack([term.to(lm_loss.device) for term in terms]).sum()
        return lm_loss + moe_loss, moe_loss, terms


def drop_none(**kwargs) -> dict:
    """Return the arguments that are set."""
    return {k: v for k, v in kwargs.items() if v is not None}
