"""Turn images into the prompts of a decoder's last layers, with mm_injection adaption_prompt.

No token of the text stands for an image there. n samples, N images, P features of an image, C tower width, K prompts
of a layer, D model width.
"""

from __future__ import annotations

import torch

from llava_lite.model.fusion.splice import placeholder_mask


class VisualPromptsMixin:
    """Encode the images of a batch, one a sample, for a class with the methods of EmbeddingMixin."""

    def visual_prompts(self, num_samples: int, images=None, image_features=None, image_rows=None):
        """Return the prompts [n, K, D] that the images of n samples make, with mm_injection adaption_prompt.

        images [N, 3, H, W], or a list with media, or the tower's image_features [N, P, C]: one of each sample;
        image_rows [N] tells the sample of each where some have none. A sample without an image gets zeros, or with
        mm_text_only blank those of an image of zeros. None where there is nothing to add. Raises ValueError for two
        images of a sample.
        """
        images, image_features = self.without_media(images, image_features)
        images, image_features = one_crop(images, 3), one_crop(image_features, 2)
        given = images if image_features is None else image_features
        num_images = 0 if given is None else len(given)
        rows = image_owners(num_images, num_samples, image_rows)
        adds_blank = self.config.mm_text_only == "blank" and self.get_vision_tower() is not None
        if not (num_images or adds_blank or self.needs_dummy()):
            return None
        # One call on every rank, whatever its images are: see needs_dummy.
        is_extra = adds_blank or not num_images
        if image_features is not None:
            blank = self.get_vision_tower()(self.dummy_images()) if adds_blank else self.dummy_feature_like(given)
            features = torch.cat([given.to(blank.device, blank.dtype), blank]) if is_extra else given
            vectors = self.project_features(features)
        elif is_extra:
            blank = self.dummy_images()
            pixels = self.get_vision_tower().pixels(stack_images(given)) if num_images else blank[:0]
            vectors = self.encode_images(torch.cat([pixels.to(blank.device), blank]))
        else:
            vectors = self.encode_images(given)
        prompts = vectors.new_zeros(num_samples, *vectors.shape[1:])
        if adds_blank:
            prompts = prompts + vectors[-1]
        # Of no image too: this keeps tower and connector in the graph.
        return prompts.index_copy(0, rows.to(vectors.device), vectors[:num_images])

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, L, D] of ids without placeholders; ValueError if there are any."""
        if input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            num_placeholders = int(placeholder_mask(input_ids, self.config.image_token_index).sum())
            if num_placeholders:
                raise ValueError(
                    f"{num_placeholders} image placeholders in input_ids of a model with mm_injection "
                    "adaption_prompt, in whose text no image stands; take them out and give one image a sequence."
                )
        return self.get_input_embeddings()(input_ids)


def one_crop(given, num_dims: int):
    """Return images [N, ...] of num_dims dimensions each, or their features, that may come as crops or as a list.

    Raises ValueError for an image of several crops: there is one place for each.
    """
    if given is None or len(given) == 0:
        return given
    for i, one in enumerate(given):
        if one.dim() == num_dims + 1 and len(one) != 1:
            raise ValueError(
                f"image {i} has {len(one)} crops; with mm_injection adaption_prompt an image is read as a whole: give "
                "one crop of each."
            )
    flat = [one[0] if one.dim() == num_dims + 1 else one for one in given]
    return torch.stack(flat) if isinstance(given, list) or given.dim() > num_dims + 1 else given


def image_owners(num_images: int, num_samples: int, image_rows=None) -> torch.Tensor:
    """Return the sample [N] of each image: image_rows, else one image for each sample; ValueError if neither fits."""
    if image_rows is None:
        if num_images not in (0, num_samples):
            raise ValueError(
                f"{num_images} images for {num_samples} sequences with mm_injection adaption_prompt: give one image "
                "for each, or image_rows, the sequence of each image."
            )
        return torch.arange(num_images)
    rows = torch.as_tensor(image_rows)
    is_outside = (rows < 0) | (rows >= num_samples)
    if len(rows) != num_images or len(rows.unique()) != num_images or bool(is_outside.any()):
        raise ValueError(
            f"image_rows {rows.tolist()} of {num_images} images for {num_samples} sequences; with mm_injection "
            "adaption_prompt a sequence has one image or none."
        )
    return rows


def stack_images(images) -> torch.Tensor:
    """Return images as one tensor [N, 3, H, W] from a tensor or a list of [3, H, W] or [n, 3, H, W]."""
    if isinstance(images, torch.Tensor):
        if images.dim() < 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W]: images[None] of one.")
        return images.flatten(0, -4)
    shapes = {tuple(i.shape[-3:]) for i in images}
    if len(shapes) > 1:
        raise ValueError(f"images of one batch must share one shape; got {sorted(shapes)}. Process them alike.")
    return torch.cat([i.flatten(0, -4) if i.dim() > 3 else i[None] for i in images])
