"""Turn a record and its images into an example: token ids with every feature of an image, labels, image tensors."""

import logging

import torch
from PIL import Image

from llava_lite.constants import ASPECT_RATIOS, IGNORE_INDEX
from llava_lite.conversation import Conversation
from llava_lite.conversation.tokenize import truncate_example
from llava_lite.data.crops import CropDraws
from llava_lite.data.encode import RecordEncoder, expand_image_tokens
from llava_lite.data.errors import DataError
from llava_lite.data.feature_cache import StoredImage
from llava_lite.data.media_files import LoadedMix
from llava_lite.data.records.record import Record, missing_images
from llava_lite.data.skipped import empty_example
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import image_bytes, in_channels, prepare_image
from llava_lite.media.resize import Resize
from llava_lite.media.transform import OtherTransform, read_transform

logger = logging.getLogger(__name__)

# The layout of LLaVA-1.5's tower: one crop an image.
CLIP_336 = ImageLayout(576)


class ExampleMaker:
    """Makes examples of records and their opened images, for annotation files and for shards.

    layout: how an image is prepared and becomes features. max_length: tokens of an example, with features; longer
    ones are truncated. image_processor: may be None if no record has images. image_resize: return images as bytes,
    which the tower of this image processor normalises; None: as normalised float32. placeholder_as_text: `<image>` in
    a record without images is text; else such a record cannot be used. injection, image_position: see RecordEncoder.
    """

    # Set by crop_randomly.
    crops: CropDraws | None = None

    def __init__(
        self,
        tokenizer,
        image_processor,
        conv_template: str | Conversation,
        layout: ImageLayout = CLIP_336,
        max_length: int = 2048,
        mm_use_im_start_end: bool = False,
        image_resize: Resize | None = None,
        placeholder_as_text: bool = False,
        injection: str = "tokens",
        image_position: str = "placeholder",
    ):
        if layout.aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise ValueError(f"unknown image_aspect_ratio {layout.aspect_ratio!r}; known: {known}.")
        self.encoder = RecordEncoder(tokenizer, conv_template, mm_use_im_start_end, injection, image_position)
        self.image_processor = image_processor
        self.layout = layout
        self.max_length = max_length
        self.image_resize = image_resize
        self.placeholder_as_text = placeholder_as_text
        self.transform = _get_transform(image_processor) if image_resize and image_processor is not None else None

    def crop_randomly(self, seed: int) -> None:
        """Train on random crops of the images, if the layout says so; else the centre is cropped, as in inference."""
        if self.layout.aspect_ratio == "random_crop":
            self.crops = CropDraws(seed)

    def example(
        self,
        record: Record,
        images: list[Image.Image | LoadedMix | StoredImage],
        number: int = 0,
        epoch: int | None = None,
    ) -> dict:
        """Return {"id", "input_ids" [L], "labels" [L]} and, if the record has images, "images" and "image_sizes".

        images: a tensor for each image, [3, H, W], or [n, 3, H, W] of its crops for any-resolution; uint8 or float32.
        For media that together are an image it is {kind: (tensor of a sample, weight)} as load_media returns them.
        image_sizes: width and height of each. Images with cached features have "image_features" instead, [P, C] or
        [n, P, C]. number, epoch: of the record, for random crops; see CropDraws. Raises DataError with the name of a
        record that cannot be used.
        """
        input_ids, labels = self._encode(record, images)
        example = {"id": record.id, "input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
        if images and isinstance(images[0], StoredImage):
            example["image_features"] = [image.features for image in images]
        elif images:
            example["images"] = [
                image.media
                if isinstance(image, LoadedMix)
                else self.get_pixels(record, image, self.crops and self.crops.box(image.size, number, k, epoch))
                for k, image in enumerate(images)
            ]
        if images:
            example["image_sizes"] = [image.size for image in images]
            # The ids of such an example do not show whose image it is.
            example |= {} if self.layout.in_text else {"in_text": False}
        return example

    def pixels(self, image: Image.Image, box=None) -> torch.Tensor:
        """Return the pixels of an image, or of the part `box` of it, for the tower."""
        shape = self.layout.aspect_ratio, self.layout.pinpoints
        image = in_channels(image, self.layout.channels)
        if self.transform is None:
            return prepare_image(image, self.image_processor, *shape, box=box)
        return image_bytes(image, self.transform, *shape, self.image_resize, box)

    def get_pixels(self, record: Record, image: Image.Image, box=None) -> torch.Tensor:
        """Return the pixels of an image of a record; DataError with the name of the record if that fails."""
        try:
            return self.pixels(image, box)
        # An image processor may raise any error for an image of an unexpected shape.
        except Exception as error:
            width, height = image.size
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{record.name}: its image of {width} x {height} cannot be prepared: {reason}") from error

    def empty(self, name: str) -> dict:
        """Return the example in place of a record that is left out."""
        return empty_example(name, self.encoder.tokenizer.pad_token_id)

    def _encode(self, record: Record, images) -> tuple[list[int], list[int]]:
        if not (record.images or self.placeholder_as_text) and (reason := missing_images(record)):
            raise DataError(reason)
        input_ids, labels = self.encoder(record)
        has_places = self.encoder.injection == "tokens"
        lengths = [self.layout.num_tokens(image.size) for image in images] if has_places else []
        input_ids, labels = expand_image_tokens(input_ids, labels, lengths)
        length = len(input_ids)
        try:
            input_ids, labels, num_cut = truncate_example(input_ids, labels, self.max_length, lengths)
        except ValueError as error:
            raise DataError(f"{record.name}: {error}") from error
        if num_cut:
            raise DataError(f"{record.name}: {num_cut} images lie beyond the maximum of {self.max_length} tokens.")
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(
                f"{record.name} has no supervised token in the first {len(labels)} of its {length} tokens."
            )
        return input_ids, labels


def _get_transform(image_processor):
    try:
        return read_transform(image_processor)
    except OtherTransform as reason:
        logger.info("images are normalised by the image processor, as float32 of four times the bytes: %s.", reason)
        return None
