"""Turn pixels into image features under the names and shapes that transformers' tools expect.

N images, S tokens of an image inside the tower, P features of an image, C tower width, D model width,
B batch, L positions.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check

from llava_lite.model.encoders.whole import WholeTower
from llava_lite.model.fusion.splice import check_counts, placeholder_mask, splice
from llava_lite.tower_config import drops_first

# transformers' names for the selected tokens of the tower, and LLaVA's.
STRATEGIES = {"default": "patch", "full": "cls_patch"}


class ImageFeaturesMixin:
    """`get_image_features`, and images in a call with embeddings in place of ids."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes=None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the full tower's output for images [N, 3, H, W], with the decoder's input as `pooler_output`.

        pooler_output: a tuple of [P, D], one an image. last_hidden_state: [N, S, C], of the last layer, which LLaVA
        does not read. In all but pooler_output crops (see `encode_each_image`) count as images. The layers after the
        selected one run only here: a forward call uses `encode_images`.
        """
        tower, vision = self.get_vision_tower(), self.config.vision_config
        if tower is None:
            raise ValueError("this model has no vision tower; set mm_vision_tower in its config.")
        crops = (
            pixel_values.flatten(0, -4)
            if isinstance(pixel_values, torch.Tensor)
            else torch.cat([image.flatten(0, -4) if image.dim() > 3 else image[None] for image in pixel_values])
        )
        if isinstance(tower, WholeTower):
            features = tuple(self.encode_images(crops))
            whole = BaseModelOutputWithPooling(pooler_output=features)
            return whole.to_tuple() if return_dict is False else whole
        wanted = self.config if vision is None else vision
        outputs = tower.encoder(
            tower.pixels(crops),
            output_hidden_states=True,
            output_attentions=wanted.output_attentions if output_attentions is None else output_attentions,
        )
        if isinstance(pixel_values, torch.Tensor) and pixel_values.dim() < 5:
            layer = self.config.mm_vision_select_layer if vision_feature_layer is None else vision_feature_layer
            strategy = STRATEGIES.get(vision_feature_select_strategy, self.config.mm_vision_select_feature)
            read = outputs.hidden_states[layer]
            if strategy == self.config.mm_vision_select_feature:
                read = tower.read_tokens(read)
            elif drops_first(strategy, tower.config):
                read = read[:, 1:]
            features = tuple(self.get_model().mm_projector(read))
        else:
            joined, lengths = self.encode_each_image(pixel_values, image_sizes)
            features = joined[: sum(lengths)].split(lengths)
        shown = wanted.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states if shown else None,
            attentions=outputs.attentions,
        )
        plain = self.config.return_dict is False if return_dict is None else not return_dict
        return output.to_tuple() if plain else output

    def embed_traced(self, input_ids: torch.Tensor, images, image_sizes=None) -> torch.Tensor:
        """Return embeddings [B, L, D] as `embed_batch` does, for torch.compile: no shape depends on the ids.

        There must be one placeholder a feature, as the processor writes them; else the compiled call raises.
        """
        if images is None and not self.needs_dummy():
            return self.get_input_embeddings()(input_ids)
        features, lengths = self.encode_each_image(self.dummy_images() if images is None else images, image_sizes)
        is_image = placeholder_mask(input_ids, self.config.image_token_index)  # [B, L]
        if images is None:
            is_image = torch.zeros_like(is_image)
        else:
            torch_compilable_check(is_image.sum() == sum(lengths), "not one image placeholder for every feature")
        return splice(self.get_input_embeddings()(input_ids.masked_fill(is_image, 0)), is_image, features)

    def write_images(self, inputs_embeds: torch.Tensor, images, image_sizes=None) -> torch.Tensor:
        """Return embeddings [B, L, D] with image features in place of the placeholder's embeddings.

        For a caller who has embedded the ids, which needs a placeholder of the vocabulary, one a feature. Raises
        ValueError if there are not as many positions as features.
        """
        index = self.config.image_token_index
        if index < 0:
            raise ValueError(
                f"pixel_values with inputs_embeds, but image_token_index {index} has no embedding to find them by. "
                "Give input_ids, or write the features of get_image_features into inputs_embeds and leave "
                "pixel_values out."
            )
        features, lengths = self.encode_each_image(images, image_sizes)
        placeholder = self.get_input_embeddings()(torch.tensor(index, device=inputs_embeds.device))  # [D]
        is_image = (inputs_embeds == placeholder.to(inputs_embeds.device)).all(-1)  # [B, L]
        if check_counts(int(is_image.sum()), lengths):
            raise ValueError(
                f"{len(lengths)} embeddings of image placeholders; in inputs_embeds there must be one a feature, "
                f"{sum(lengths)}."
            )
        return splice(inputs_embeds, is_image, features)
