"""Turn ids and pictures into the embeddings that a decoder reads; the stack and the whole model alike.

B batch, T tokens before the splice, L after, N pictures, P features of a crop of one, F of all, D model width.
"""

from __future__ import annotations

import torch

from llava_lite.model.crops import crops_of_each, merge_crops
from llava_lite.model.llava_names import without_blanks
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

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return features [N, P, D] of the tower's features [N, P, C]."""
        weight = next(self.get_model().mm_projector.parameters(), features)
        if weight.is_floating_point() and not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return self.get_model().mm_projector(features)

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
        weight = self.get_model().image_newline
        if is_partitioned(weight) and weight.numel() == 0:
            # DeepSpeed gathers a weight that is read beside its module's own forward in an engine's forward alone, not
            # in `generate`.
            with gathered([weight]):
                weight = weight.clone()
        return weight.to(device)

    def dummy_images(self) -> torch.Tensor:
        """Return one blank picture [1, 3, H, W]."""
        tower = self.get_vision_tower()
        return torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device, dtype=tower.dtype)

    def needs_dummy(self) -> bool:
        """Tell whether a batch without pictures must still run tower and connector, and read the newline.

        Every rank has to run the same collectives in the same order: ZeRO-3 gathers weights in the forward pass,
        ZeRO-2 reduces gradients in the backward pass. Without this, ranks with and without pictures hang.
        """
        if self.get_vision_tower() is None:
            return False
        # ZeRO-3 partitions every weight or none.
        return self.training or is_partitioned(next(self.parameters()))

    def embed_batch(
        self, batch: Batch, images, image_sizes=None, pad_left: bool | None = None, image_features=None
    ) -> tuple[Batch, torch.Tensor]:
        """Return the batch with expanded placeholders and its embeddings [B, L, D], pictures written in.

        A row of text alone may bring a blank picture, as LLaVA's collator gives it one; it is not looked at. Rows
        with labels that grow here are cut at config.tokenizer_model_max_length; LLaVA cuts prompts without labels too,
        and with them the end of the question. image_features: as in encode_pictures; the tower then runs for no batch,
        so a batch of text alone has an empty one.
        """
        if torch.compiler.is_compiling():
            return batch, self.embed_traced(batch.input_ids, images, image_sizes)
        if images is not None:
            is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
            images, image_sizes = without_blanks(is_picture, images, image_sizes)
        given = images if image_features is None else image_features
        has_images = given is not None and len(given) > 0
        features, lengths = None, []
        if has_images:
            # Before the decoder, once, on every rank: see needs_dummy.
            features, lengths = self.encode_pictures(images, image_sizes, image_features)
        elif self.needs_dummy() and image_features is not None:
            features, _ = self.encode_pictures(None, None, self.get_vision_tower().dummy_feature[None])
        elif self.needs_dummy():
            features, _ = self.encode_pictures(self.dummy_images())
        elif batch.input_ids.shape[1] == 1:
            # A decoding step: its ids come from the vocabulary, and looking at them would wait for the device.
            return batch, self.get_input_embeddings()(batch.input_ids)
        is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
        num_placeholders = int(is_picture.sum())
        grows = has_images and check_counts(num_placeholders, lengths)
        if grows:
            if pad_left is None and self.config.tokenizer_padding_side == "left":
                pad_left = True
            batch = expand_placeholders(batch, is_picture, lengths, pad_left)
            is_picture = placeholder_mask(batch.input_ids, self.config.image_token_index)
        elif not has_images and num_placeholders and not bool((batch.input_ids < 0).any()):
            # Without pictures a placeholder of the vocabulary is a word like others, as in transformers.
            is_picture = torch.zeros_like(is_picture)
        elif not has_images and num_placeholders:
            raise ValueError(
                f"{num_placeholders} image placeholders in input_ids but no pictures; pass images= or pixel_values=."
            )
        embeds = self.get_input_embeddings()(batch.input_ids.masked_fill(is_picture, 0))  # [B, L, D]
        if features is not None:
            embeds = splice(embeds, is_picture, features)
        if grows and batch.labels is not None:
            batch, embeds = cut_rows(batch, embeds, self.config.tokenizer_model_max_length)
        return batch, embeds


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
