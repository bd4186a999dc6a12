"""Turn ids and pictures into the embeddings that a decoder reads; the stack and the whole model alike.

B batch, T tokens before the splice, L after, N pictures, P features of a crop of one, F of all, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llava_lite.model.crops import crops_of_each, merge_crops
from llava_lite.model.llava_names import without_blanks
from llava_lite.model.placement import place_of, present
from llava_lite.model.splice import Batch, check_counts, cut_rows, expand_placeholders, placeholder_mask, splice
from llava_lite.model.weights import gathered, is_partitioned


class EmbeddingMixin:
    """Encode pictures and write them into the embeddings of the ids, for a class with `get_model`."""

    def encode_images(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Return features [N, P, D] of pictures or crops [N, 3, H, W] (or a list of [3, H, W] or [n, 3, H, W])."""
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError(
                "this model has no vision tower but pictures were given; set mm_vision_tower in its config."
            )
        return self.project_features(tower(stack_images(images)))

    @torch.no_grad()
    def tower_features(self, images, image_sizes=None) -> list[torch.Tensor]:
        """Return what the tower makes of each image, [n, P, C] of its n crops; images as in encode_pictures."""
        tower = self.get_vision_tower()
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            groups = list(images.split(1))
        else:
            groups = crops_of_each(images, image_sizes, self.config.picture_layout)
        return list(tower(torch.cat(groups)).split([len(group) for group in groups]))

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return features [N, P, D] of the tower's features [N, P, C]."""
        projector = self.get_model().mm_projector
        features = features.to(place_of(projector, features.device))
        weight = next(projector.parameters(), features)
        if weight.is_floating_point() and not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return projector(features)

    def encode_pictures(self, images, image_sizes=None, image_features=None) -> tuple[torch.Tensor, list[int]]:
        """Return the features [F, D] of all pictures, one picture after another, and how many each has.

        images: [N, 3, H, W]; or [N, n, 3, H, W] or a list of [3, H, W] and [n, 3, H, W], where n crops are one picture
        and are merged as the config says. image_sizes: (width, height) of each, needed to merge `spatial` crops.
        image_features: what the tower made of the pictures before, in place of them: [N, P, C] or a list of [n, P, C].
        A newline, if the model has one, follows at the end once more, whether it was used or not: see needs_dummy.
        """
        encode, given, plain_dim = self.encode_images, images, 4
        if image_features is not None:
            encode, given, plain_dim = self.project_features, image_features, 3
        if isinstance(given, torch.Tensor) and given.dim() <= plain_dim:
            crops = encode(given)  # [N, P, D]
            pictures, newline = [crops.flatten(0, 1)], self.newline(crops.device)
            lengths = [crops.shape[1]] * len(crops)
        else:
            layout = self.config.picture_layout
            sizes = None if image_sizes is None else [tuple(int(side) for side in size) for size in image_sizes]
            groups = crops_of_each(given, sizes, layout) if image_features is None else list(given)
            crops = encode(torch.cat(groups))
            newline = self.newline(crops.device)
            pictures = [
                merge_crops(features, None if sizes is None else sizes[i], layout, newline)
                for i, features in enumerate(crops.split([len(group) for group in groups]))
            ]
            lengths = [len(features) for features in pictures]
        if newline is not None:
            pictures.append(newline[None])
        return torch.cat(pictures), lengths

    def newline(self, device) -> torch.Tensor | None:
        """Return the vector [D] that closes a row of patches, None in a model that has none."""
        if not self.config.has_newline:
            return None
        stack = self.get_model()
        if stack.image_newline.is_meta:
            with present(stack):
                if stack.image_newline.is_meta:
                    raise ValueError(
                        "image_newline was not loaded: a device map that names this single parameter brings it for no "
                        "call. Give it a device, or name the module that holds it."
                    )
                return stack.image_newline.to(device, copy=True)
        weight = stack.image_newline
        if is_partitioned(weight) and weight.numel() == 0:
            # DeepSpeed gathers a weight that is read beside its module's own forward in an engine's forward alone, not
            # in `generate`.
            with gathered([weight]):
                weight = weight.clone()
        return weight.to(device)

    def dummy_images(self) -> torch.Tensor:
        """Return one blank picture [1, 3, H, W]."""
        tower = self.get_vision_tower()
        shape = (1, 3, tower.image_size, tower.image_size)
        return torch.zeros(shape, device=place_of(tower, torch.device("cpu")), dtype=tower.dtype)

    def needs_dummy(self) -> bool:
        """Tell whether a batch without pictures must still run tower and connector, and read the newline.

        Every rank has to run the same collectives in the same order: ZeRO-3 gathers weights in the forward pass,
        ZeRO-2 reduces gradients in the backward pass. Without this, ranks with and without pictures hang.
        """
        if self.get_vision_tower() is None:
            return False
        # ZeRO-3 partitions every weight or none.
        return self.training or is_partitioned(next(self.parameters()))

    def encode_or_dummy(self, images, image_sizes=None, image_features=None):
        """Return the features [F, D] of a batch's images and how many each has; without images None, or a dummy's.

        Before the decoder, once, on every rank: see needs_dummy. A dummy has features and no length.
        """
        given = images if image_features is None else image_features
        if given is not None and len(given) > 0:
            return self.encode_pictures(images, image_sizes, image_features)
        if not self.needs_dummy():
            return None, []
        if image_features is not None:
            features, _ = self.encode_pictures(None, None, self.get_vision_tower().dummy_feature[None])
        else:
            features, _ = self.encode_pictures(self.dummy_images())
        return features, []

    def embed_batch(
        self, batch: Batch, images, image_sizes=None, pad_left: bool | None = None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch with expanded placeholders and its embeddings [B, L, D], images written in.

        A row of text alone may bring a blank image, as LLaVA's collator gives it one; it is not looked at. Rows
        with labels that grow here are cut at config.tokenizer_model_max_length; LLaVA cuts prompts without labels too,
        and with them the end of the question. image_features: as in encode_pictures; the tower then runs for no batch,
        so a batch of text alone has an empty one. An attention_mask longer than the ids covers cached positions before
        them and stays so.
        """
        if torch.compiler.is_compiling():
            return batch, self.embed_traced(batch.input_ids, images, image_sizes)
        if images is not None:
            is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
            images, image_sizes = without_blanks(is_picture, images, image_sizes)
        features, lengths = self.encode_or_dummy(images, image_sizes, image_features)
        if features is None and batch.input_ids.shape[1] == 1:
            # A decoding step: its ids come from the vocabulary, and looking at them would wait for the device.
            return batch, self.get_input_embeddings()(batch.input_ids)
        is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
        num_placeholders = int(is_picture.sum())
        grows = bool(lengths) and check_counts(num_placeholders, lengths)
        if grows:
            if pad_left is None and self.config.tokenizer_padding_side == "left":
                pad_left = True
            batch = expand_new(batch, is_picture, lengths, pad_left)
            is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
        elif not lengths and num_placeholders and not bool((batch.input_ids < 0).any()):
            # Without images a placeholder of the vocabulary is a token like others, as in transformers.
            is_picture = torch.zeros_like(is_picture)
        elif not lengths and num_placeholders:
            raise ValueError(
                f"{num_placeholders} image placeholders in input_ids but no images; pass images= or pixel_values=."
            )
        embeds = self.write_features(batch.input_ids, is_picture, features)
        if grows and batch.labels is not None:
            batch, embeds = cut_rows(batch, embeds, self.config.tokenizer_model_max_length)
        return batch, embeds

    def embed_after_cache(
        self, batch: Batch, num_cached: int, images=None, image_sizes=None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch of all ids, placeholders expanded, and the embeddings [B, L - num_cached, D] of the new.

        The first num_cached positions are in a cache. Images: those of all ids, or those of the new ids alone, for
        which the cached ids must have one placeholder a feature. Raises ValueError where they are neither.
        """
        index = self.config.image_token_index
        features, lengths = self.encode_or_dummy(images, image_sizes, image_features)
        is_picture = placeholder_mask(batch.input_ids, index)
        if lengths and int(is_picture.sum()) == len(lengths) != sum(lengths):
            batch = expand_placeholders(batch, is_picture, lengths)
            is_picture = placeholder_mask(batch.input_ids, index)
        check_some_are_new(batch.input_ids.shape[1], num_cached)
        is_new = is_picture.clone()
        is_new[:, :num_cached] = False
        num_all, num_new, num_features = int(is_picture.sum()), int(is_new.sum()), sum(lengths)
        is_expanded = num_all == num_new or num_all - num_new >= self.get_vision_tower().num_patches
        if lengths and num_all == num_features:
            features = features[:num_features][is_new[is_picture]]
        elif not lengths and is_expanded and not bool((batch.input_ids < 0).any()):
            # As in embed_batch: without images a placeholder of the vocabulary is a token like others.
            is_new = torch.zeros_like(is_new)
        elif num_new != num_features or not is_expanded:
            raise ValueError(
                f"{num_all} image placeholders, {num_new} of them after the {num_cached} cached positions, but "
                f"{len(lengths)} images of {num_features} features together. Give the images of all ids; or the "
                "images of the new ids alone and one placeholder a feature in all ids, as the processor writes them."
            )
        return batch, self.write_features(batch.input_ids[:, num_cached:], is_new[:, num_cached:], features)

    def write_features(self, input_ids, is_picture, features) -> torch.Tensor:
        """Return the embeddings [B, L, D] of ids, with features [F, D] (or None) where `is_picture` says."""
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_picture, 0))
        return embeds if features is None else splice(embeds, is_picture, features)


def expand_new(batch: Batch, is_picture, lengths, pad_left) -> Batch:
    """Return `expand_placeholders` of ids whose mask may cover cached positions before them; it then still does."""
    mask, num_ids = batch.attention_mask, batch.input_ids.shape[1]
    if mask is None or mask.shape[1] == num_ids:
        return expand_placeholders(batch, is_picture, lengths, pad_left)
    cached = mask[:, :-num_ids]
    grown = expand_placeholders(replace(batch, attention_mask=mask[:, -num_ids:]), is_picture, lengths, pad_left)
    return replace(grown, attention_mask=torch.cat([cached, grown.attention_mask], dim=1))


def check_some_are_new(num_ids: int, num_cached: int) -> None:
    """Raise ValueError if a call with a cache brings all ids and none is new."""
    if num_ids <= num_cached:
        raise ValueError(
            f"{num_ids} ids and a cache of {num_cached} positions: no id is new. Give all ids, or the new ones with "
            "an attention_mask that covers the cached positions too. One placeholder an image (-200) is understood "
            "where all images are given."
        )


def stack_images(images) -> torch.Tensor:
    """Return pictures as one tensor [N, 3, H, W] from a tensor or a list of [3, H, W] or [n, 3, H, W]."""
    if isinstance(images, torch.Tensor):
        if images.dim() < 4:
            raise ValueError(f"pictures have shape {tuple(images.shape)}; expected [N, 3, H, W]: images[None] of one.")
        return images.flatten(0, -4)
    shapes = {tuple(i.shape[-3:]) for i in images}
    if len(shapes) > 1:
        raise ValueError(f"pictures of one batch must share one shape; got {sorted(shapes)}. Process them alike.")
    return torch.cat([i.flatten(0, -4) if i.dim() > 3 else i[None] for i in images])
