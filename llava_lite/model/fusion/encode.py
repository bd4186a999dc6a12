"""Turn ids and images into the embeddings that a decoder reads; for the stack and the full model alike.

B batch, T tokens before images are expanded, L after, N images, P features of a crop of one, F of all, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llava_lite.checkpoints.copying import gathered, is_partitioned
from llava_lite.model.cached_features import check_cached_features
from llava_lite.model.compat.methods import without_empty_images
from llava_lite.model.fusion.crops import crops_of_each, merge_crops
from llava_lite.model.fusion.media import features_of, has_mixes
from llava_lite.model.fusion.splice import Batch, check_counts, cut_rows, expand_placeholders, placeholder_mask, splice
from llava_lite.model.fusion.visual_prompts import VisualPromptsMixin, stack_images
from llava_lite.model.placement import get_device, present


class EmbeddingMixin(VisualPromptsMixin):
    """Encode images and write them into the embeddings of the ids, for a class with `get_model`."""

    def encode_images(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Return features [N, P, D] of images or crops [N, 3, H, W] (or a list of [3, H, W] or [n, 3, H, W])."""
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError(
                "this model has no vision tower but images were given; set mm_vision_tower in its config."
            )
        return self.project_features(tower(stack_images(images)))

    @torch.no_grad()
    def tower_features(self, images, image_sizes=None) -> list[torch.Tensor]:
        """Return the tower's features of each image, [n, P, C] for its n crops; images as in encode_each_image."""
        tower = self.get_vision_tower()
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            groups = list(images.split(1))
        else:
            groups = crops_of_each(images, image_sizes, self.config.image_layout)
        return list(tower(torch.cat(groups)).split([len(group) for group in groups]))

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return the connector's output [N, P, D] for the tower's features [N, P, C]."""
        projector = self.get_model().mm_projector
        features = features.to(get_device(projector, features.device))
        weight = next(projector.parameters(), features)
        if weight.is_floating_point() and not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return projector(features)

    def without_media(self, images, image_features=None):
        """Return (images, image_features): where some images are media, the tower's features [N, 1, C] of all.

        images: also a list of pixels [3, H, W] and of media, {kind: (sample, weight)}; see features_of.
        """
        if image_features is not None or not has_mixes(images):
            return images, image_features
        if self.config.image_layout.is_anyres:
            raise ValueError("some images are media, which are one image each; set image_aspect_ratio to square.")
        return None, features_of(self.get_vision_tower(), images)

    def encode_each_image(self, images, image_sizes=None, image_features=None) -> tuple[torch.Tensor, list[int]]:
        """Return the features [F, D] of all images, one image after another, and the number of each.

        images: [N, 3, H, W]; or [N, n, 3, H, W] or a list of [3, H, W] and [n, 3, H, W], where n crops are one image
        and are merged as the config says; or a list with media, see without_media. image_sizes: (width, height) of
        each, needed to merge `spatial` crops. image_features: the tower's features in place of the images, [N, P, C]
        or a list of [n, P, C].
        The model's own vectors among the features, if it has any, are appended at the end, whether they were used or
        not: see needs_dummy.
        """
        images, image_features = self.without_media(images, image_features)
        encode, given, plain_dim = self.encode_images, images, 4
        if image_features is not None:
            encode, given, plain_dim = self.project_features, image_features, 3
        newline = None
        if isinstance(given, torch.Tensor) and given.dim() <= plain_dim:
            crops = encode(given)  # [N, P, D]
            vectors = self.get_vectors(crops.device)
            merged = list(crops) if vectors else [crops.flatten(0, 1)]
            lengths = [crops.shape[1]] * len(crops)
        else:
            layout = self.config.image_layout
            sizes = None if image_sizes is None else [tuple(int(side) for side in size) for size in image_sizes]
            groups = crops_of_each(given, sizes, layout) if image_features is None else list(given)
            crops = encode(torch.cat(groups))
            vectors = self.get_vectors(crops.device)
            newline = vectors.get("image_newline")
            merged = [
                merge_crops(features, None if sizes is None else sizes[i], layout, newline)
                for i, features in enumerate(crops.split([len(group) for group in groups]))
            ]
            lengths = [len(features) for features in merged]
        if "image_start" in vectors:
            start, end = (vectors[name][None].to(crops.dtype) for name in ("image_start", "image_end"))
            merged = [torch.cat([start, features, end]) for features in merged]
            lengths = [length + 2 for length in lengths]
        return torch.cat([*merged, *(vector[None] for vector in vectors.values())]), lengths

    def get_vectors(self, device) -> dict[str, torch.Tensor]:
        """Return the model's own vectors [D] among the features of images, by name; see config.image_vectors."""
        return {name: self.get_vector(name, device) for name in self.config.image_vectors}

    def get_vector(self, name: str, device) -> torch.Tensor:
        """Return a vector [D] of the stack, wherever a device map or ZeRO-3 keeps it."""
        stack = self.get_model()
        weight = getattr(stack, name)
        if weight.is_meta:
            with present(stack):
                weight = getattr(stack, name)
                if weight.is_meta:
                    raise ValueError(
                        f"{name} was not loaded: a device map that names this single parameter loads it for no "
                        "call. Give it a device, or name the module that holds it."
                    )
                return weight.to(device, copy=True)
        if is_partitioned(weight) and weight.numel() == 0:
            # DeepSpeed gathers a weight that is read outside its module's forward only in the engine's forward, not in
            # `generate`.
            with gathered([weight]):
                weight = weight.clone()
        return weight.to(device)

    def dummy_feature_like(self, features: torch.Tensor) -> torch.Tensor:
        """Return one feature of zeros for the connector, [1, P, C] of the shape of given features [N, P, C]."""
        tower = self.get_vision_tower()
        shape = features.shape[1:] if features.dim() == 3 else tower.dummy_feature.shape
        return tower.dummy_feature.new_zeros(1, *shape)

    def dummy_images(self) -> torch.Tensor:
        """Return one empty image [1, 3, H, W]."""
        tower = self.get_vision_tower()
        shape = (1, 3, tower.image_size, tower.image_size)
        return torch.zeros(shape, device=get_device(tower, torch.device("cpu")), dtype=tower.dtype)

    def needs_dummy(self) -> bool:
        """Return whether a batch without images must still run tower and connector, and read the newline.

        Every rank must run the same collectives in the same order: ZeRO-3 gathers weights in the forward pass, ZeRO-2
        reduces gradients in the backward pass. Otherwise ranks with and without images wait for each other forever.
        """
        if self.get_vision_tower() is None:
            return False
        # ZeRO-3 partitions every weight or none.
        return self.training or is_partitioned(next(self.parameters()))

    def encode_or_dummy(self, images, image_sizes=None, image_features=None):
        """Return the features [F, D] of a batch's images and the number of each; without images None, or a dummy's.

        Called once before the decoder, on every rank: see needs_dummy. A dummy has features and no length.
        """
        given = images if image_features is None else image_features
        if given is not None and len(given) > 0:
            return self.encode_each_image(images, image_sizes, image_features)
        if not self.needs_dummy():
            return None, []
        if image_features is not None:
            features, _ = self.encode_each_image(None, None, self.get_vision_tower().dummy_feature[None])
        else:
            features, _ = self.encode_each_image(self.dummy_images())
        return features, []

    def embed_inputs(
        self, batch: Batch, embeds, images=None, pixel_values=None, image_sizes=None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch and its embeddings [B, L, D]: those of `embed_batch`, or given ones.

        `pixel_values` are written into given embeddings, as in transformers; `images` are in them already, as in
        LLaVA. With mm_injection adaption_prompt they are those of the text alone.
        """
        if self.config.has_prompts:
            return batch, self.embed_text(batch.input_ids) if embeds is None else embeds
        if embeds is None:
            images = pixel_values if images is None else images
            return self.embed_batch(batch, images, image_sizes, image_features=image_features)
        if pixel_values is not None:
            embeds = self.write_images(embeds, pixel_values, image_sizes)
        return batch, embeds

    def embed_batch(
        self, batch: Batch, images, image_sizes=None, pad_left: bool | None = None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch with expanded placeholders and its embeddings [B, L, D], images written in.

        A sequence of text alone may have an empty image, as LLaVA's collator gives it one; it is ignored. Sequences
        with labels that are expanded here are cut at config.tokenizer_model_max_length; LLaVA cuts prompts without
        labels too, and with them the end of the question. image_features: as in encode_each_image; the tower then
        never runs, and a batch of text alone has an empty tensor. An attention_mask longer than the ids covers the
        cached positions before them, and does so afterwards.
        """
        if torch.compiler.is_compiling():
            return batch, self.embed_traced(batch.input_ids, images, image_sizes)
        if images is not None and not has_mixes(images):
            is_image = placeholder_mask(batch.input_ids, self.config.image_token_index)
            images, image_sizes = without_empty_images(is_image, images, image_sizes)
        features, lengths = self.encode_or_dummy(images, image_sizes, image_features)
        if features is None and batch.input_ids.shape[1] == 1:
            # A decode step: its ids come from the vocabulary, and reading them would wait for the device.
            return batch, self.get_input_embeddings()(batch.input_ids)
        is_image = placeholder_mask(batch.input_ids, self.config.image_token_index)
        num_placeholders = int(is_image.sum())
        grows = bool(lengths) and check_counts(num_placeholders, lengths)
        if grows:
            if pad_left is None and self.config.tokenizer_padding_side == "left":
                pad_left = True
            batch = expand_new(batch, is_image, lengths, pad_left)
            is_image = placeholder_mask(batch.input_ids, self.config.image_token_index)
        elif not lengths and num_placeholders and not bool((batch.input_ids < 0).any()):
            # Without images a placeholder of the vocabulary is an ordinary token, as in transformers.
            is_image = torch.zeros_like(is_image)
        elif not lengths and num_placeholders:
            raise ValueError(
                f"{num_placeholders} image placeholders in input_ids but no images; pass images= or pixel_values=."
            )
        embeds = self.write_features(batch.input_ids, is_image, features)
        if grows and batch.labels is not None:
            batch, embeds = cut_rows(batch, embeds, self.config.tokenizer_model_max_length)
        return batch, embeds

    def embed_after_cache(
        self, batch: Batch, cache, num_cached: int, images=None, image_sizes=None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch of all ids, placeholders expanded, and the embeddings [B, L - num_cached, D] of new ids.

        The first num_cached positions are in the cache. Images: those of all ids, or those of the new ids alone, for
        which the cached ids must have one placeholder a feature. Raises ValueError in any other case, and for other
        images of cached ids than `generate` noted on the cache.
        """
        index = self.config.image_token_index
        features, lengths = self.encode_or_dummy(images, image_sizes, image_features)
        is_image = placeholder_mask(batch.input_ids, index)
        if lengths and int(is_image.sum()) == len(lengths) != sum(lengths):
            batch = expand_placeholders(batch, is_image, lengths)
            is_image = placeholder_mask(batch.input_ids, index)
        check_some_are_new(batch.input_ids.shape[1], num_cached)
        is_new = is_image.clone()
        is_new[:, :num_cached] = False
        num_all, num_new, num_features = int(is_image.sum()), int(is_new.sum()), sum(lengths)
        is_expanded = num_all == num_new or num_all - num_new >= self.config.num_image_tokens
        if lengths and num_all == num_features:
            check_cached_features(cache, is_image, features[:num_features], num_cached)
            features = features[:num_features][is_new[is_image]]
        elif not lengths and is_expanded and not bool((batch.input_ids < 0).any()):
            # As in embed_batch: without images a placeholder of the vocabulary is an ordinary token.
            is_new = torch.zeros_like(is_new)
        elif num_new != num_features or not is_expanded:
            raise ValueError(
                f"{num_all} image placeholders, {num_new} of them after the {num_cached} cached positions, but "
                f"{len(lengths)} images of {num_features} features together. Give the images of all ids; or the "
                "images of the new ids alone and one placeholder a feature in all ids, as the processor writes them."
            )
        return batch, self.write_features(batch.input_ids[:, num_cached:], is_new[:, num_cached:], features)

    def write_features(self, input_ids, is_image, features) -> torch.Tensor:
        """Return the embeddings [B, L, D] of ids, with features [F, D] (or None) where `is_image` is true."""
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        return embeds if features is None else splice(embeds, is_image, features)


def expand_new(batch: Batch, is_image, lengths, pad_left) -> Batch:
    """Return `expand_placeholders` of ids whose mask may cover the cached positions before them, and still does."""
    mask, num_ids = batch.attention_mask, batch.input_ids.shape[1]
    if mask is None or mask.shape[1] == num_ids:
        return expand_placeholders(batch, is_image, lengths, pad_left)
    cached = mask[:, :-num_ids]
    grown = expand_placeholders(replace(batch, attention_mask=mask[:, -num_ids:]), is_image, lengths, pad_left)
    return replace(grown, attention_mask=torch.cat([cached, grown.attention_mask], dim=1))


def check_some_are_new(num_ids: int, num_cached: int) -> None:
    """Raise ValueError if a call with a cache brings all ids and none is new."""
    if num_ids <= num_cached:
        raise ValueError(
            f"{num_ids} ids and a cache of {num_cached} positions: no id is new. Give all ids, or the new ones with "
            "an attention_mask that covers the cached positions too. One placeholder an image (-200) is accepted "
            "where all images are given."
        )
