"""Turn records into examples: token ids with every feature of a picture, labels, and the pictures as tensors."""

import logging

import torch
from PIL import Image
from torch.utils.data import Dataset

from llava_lite.anyres import PictureLayout
from llava_lite.constants import ASPECT_RATIOS, IGNORE_INDEX
from llava_lite.conversation import Conversation
from llava_lite.data.cache import file_key, key_of
from llava_lite.data.check import BadRecord, Report, check_annotations
from llava_lite.data.encode import RecordEncoder, expand_image_tokens
from llava_lite.data.feature_cache import FeatureView, StoredPicture
from llava_lite.data.index import Annotations, open_annotations
from llava_lite.data.left_out import LeftOut, empty_example
from llava_lite.data.picture_files import find_picture, open_image
from llava_lite.data.records import Record, missing_images
from llava_lite.data.scan import DataError
from llava_lite.mm_utils import truncate_example
from llava_lite.picture_steps import OtherSteps, read_steps
from llava_lite.pictures import PictureError, picture_bytes, prepare_picture
from llava_lite.resize import Resize

logger = logging.getLogger(__name__)

# LLaVA-1.5's tower, one crop a picture.
CLIP_336 = PictureLayout(576)


class ExampleMaker:
    """Makes an example of a record and its opened pictures; what data in memory-mapped files and in shards share.

    layout: how a picture is prepared and becomes features. max_length: tokens of an example, features counted; text
    behind is cut. image_processor may be None where no record has pictures. picture_resize: make pictures bytes, which
    the tower normalises as its own image processor would (it must be this one); None: numbers, normalised here.
    placeholder_as_text: take `<image>` in a record without images for text; else such a record cannot be used.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        conv_template: str | Conversation,
        layout: PictureLayout = CLIP_336,
        max_length: int = 2048,
        mm_use_im_start_end: bool = False,
        picture_resize: Resize | None = None,
        placeholder_as_text: bool = False,
    ):
        if layout.aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise ValueError(f"unknown image_aspect_ratio {layout.aspect_ratio!r}; known: {known}.")
        self.encoder = RecordEncoder(tokenizer, conv_template, mm_use_im_start_end)
        self.image_processor = image_processor
        self.layout = layout
        self.max_length = max_length
        self.picture_resize = picture_resize
        self.placeholder_as_text = placeholder_as_text
        self.steps = _steps_of(image_processor) if picture_resize and image_processor is not None else None

    def example(self, record: Record, pictures: list[Image.Image | StoredPicture]) -> dict:
        """Return {"id", "input_ids" [L], "labels" [L]} and, if the record has pictures, "images" and "image_sizes".

        images: a tensor a picture, [3, H, W], or its crops [n, 3, H, W] under any-resolution, uint8 or float32;
        image_sizes: width and height of each. Pictures whose features are stored give "image_features" in place of
        images, [P, C] or [n, P, C]. Raises DataError naming the record where it cannot be used.
        """
        input_ids, labels = self._encode(record, pictures)
        example = {"id": record.id, "input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
        if pictures and isinstance(pictures[0], StoredPicture):
            example["image_features"] = [picture.features for picture in pictures]
        elif pictures:
            example["images"] = [self.pixels_of(record, picture) for picture in pictures]
        if pictures:
            example["image_sizes"] = [picture.size for picture in pictures]
        return example

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """Return a picture as the tower takes it."""
        shape = self.layout.aspect_ratio, self.layout.pinpoints
        if self.steps is None:
            return prepare_picture(picture, self.image_processor, *shape)
        return picture_bytes(picture, self.steps, *shape, self.picture_resize)

    def pixels_of(self, record: Record, picture: Image.Image) -> torch.Tensor:
        """Return a picture of a record as the tower takes it; DataError naming the record if that cannot be made."""
        try:
            return self.pixels(picture)
        # An image processor may raise anything at an image of a shape that it does not expect.
        except Exception as error:
            width, height = picture.size
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{record.name}: its image of {width} x {height} cannot be prepared: {reason}") from error

    def empty(self, name: str) -> dict:
        """Return the example that stands in the place of a record that is left out."""
        return empty_example(name, self.encoder.tokenizer.pad_token_id)

    def _encode(self, record: Record, pictures) -> tuple[list[int], list[int]]:
        if not (record.images or self.placeholder_as_text) and (reason := missing_images(record)):
            raise DataError(reason)
        input_ids, labels = self.encoder(record)
        lengths = [self.layout.num_tokens(picture.size) for picture in pictures]
        input_ids, labels = expand_image_tokens(input_ids, labels, lengths)
        length = len(input_ids)
        try:
            input_ids, labels, num_cut = truncate_example(input_ids, labels, self.max_length, lengths)
        except ValueError as error:
            raise DataError(f"{record.name}: {error}") from error
        if num_cut:
            raise DataError(f"{record.name}: {num_cut} pictures lie beyond the maximum of {self.max_length} tokens.")
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(f"{record.name} has nothing to learn in {len(labels)} of its {length} tokens.")
        return input_ids, labels


def _steps_of(image_processor):
    try:
        return read_steps(image_processor)
    except OtherSteps as reason:
        logger.info("pictures travel as float32, four times as many bytes, made by the image processor: %s.", reason)
        return None


class LazySupervisedDataset(ExampleMaker, Dataset):
    """Examples made when asked for; costs a worker nothing but paths, the tokenizer and the image processor.

    The arguments are those of ExampleMaker; image_folder: for records whose file names none. features: of the pictures
    of these records, once they are stored; pictures are then neither opened nor encoded. left_out: the records that a
    run leaves out; one that cannot be read then gives an empty example that says why under "left_out", and no error.
    """

    features: FeatureView | None = None
    left_out: LeftOut | None = None

    def __init__(
        self,
        annotations: Annotations,
        tokenizer,
        image_processor,
        conv_template: str | Conversation,
        image_folder: str | None = None,
        layout: PictureLayout = CLIP_336,
        max_length: int = 2048,
        mm_use_im_start_end: bool = False,
        follow_links: bool = False,
        picture_resize: Resize | None = None,
        placeholder_as_text: bool = False,
    ):
        super().__init__(
            tokenizer,
            image_processor,
            conv_template,
            layout,
            max_length,
            mm_use_im_start_end,
            picture_resize,
            placeholder_as_text,
        )
        if image_processor is None and annotations.has_picture.any():
            raise ValueError(
                "records have pictures but there is no image processor; name a tower with --vision_tower."
            )
        self.annotations = annotations
        self.image_folder = image_folder
        self.follow_links = follow_links

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, i: int | tuple[int, ...]) -> dict | list[dict]:
        """Return the example of record i, or those of a pack of records.

        DataError where one cannot be used, unless `left_out` takes it; most of these a check before the run finds.
        """
        if isinstance(i, tuple):
            return [self[k] for k in i]
        if self.left_out is None:
            return self.read(i)
        if self.left_out.has(self.annotations.number(i)):
            return self._empty(i)
        try:
            return self.read(i)
        except DataError as error:
            return self._empty(i) | {"left_out": self.problem(i, error)}

    def read(self, i: int) -> dict:
        """Return the example of record i; DataError where it cannot be used."""
        record = self.annotations[i]
        if self.features is None:
            return self.example(record, [self.open(record, image) for image in record.images])
        return {"image_features": [], **self.example(record, self.features[i])}

    def _empty(self, i: int) -> dict:
        file, position = self.annotations.place(i)
        # The key of features tells the model that the tower runs on no rank, here as everywhere.
        features = {} if self.features is None else {"image_features": []}
        return features | self.empty(f"{file.name}[{position}]")

    def problem(self, i: int, error: ValueError) -> dict:
        """Return a line of the log of skipped records for record i: which it is, its place and what is wrong."""
        kind = "picture" if isinstance(error.__cause__, PictureError) else "record"
        try:
            record_id = self.annotations[i].id
        except DataError:
            record_id = None
        file, position = self.annotations.place(i)
        bad = BadRecord(file.source.path, position, record_id, kind, str(error))
        return {"place": self.annotations.number(i), **bad._asdict()}

    def open(self, record: Record, image: str | bytes) -> Image.Image:
        """Return a picture of a record; DataError naming the record if it cannot be used."""
        try:
            return open_image(image if isinstance(image, bytes) else self.picture_path(record, image))
        except PictureError as error:
            raise DataError(f"{record.name}: {error}") from error

    @property
    def sources(self) -> list[tuple[str, int]]:
        """The name of each file and how many of its records are used; for the card."""
        return [(file.name, len(positions)) for file, positions, _ in self.annotations.by_file()]

    def picture_key(self, record: Record, image: str | bytes) -> str:
        """Return a name for the content of a picture: its file as it is now, or its bytes."""
        return key_of(image) if isinstance(image, bytes) else file_key(self.picture_path(record, image))

    def picture_path(self, record: Record, name: str) -> str:
        """Return where a picture of a record lies; PictureError if there is none."""
        return find_picture(record.image_folder or self.image_folder, name, self.follow_links)[0]

    @property
    def lengths(self):
        """Tokens of each example, [N], known without making it; for the sampler."""
        return self.annotations.token_lengths.clip(max=self.max_length)

    @property
    def has_picture(self):
        """Which examples have pictures, [N] bool; for the sampler."""
        return self.annotations.has_picture


def open_dataset(
    data_path,
    tokenizer,
    image_processor,
    conv_template: str | Conversation,
    image_folder: str | None = None,
    layout: PictureLayout = CLIP_336,
    max_length: int = 2048,
    mm_use_im_start_end: bool = False,
    follow_links: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
    picture_resize: Resize | None = None,
    placeholder_as_text: bool = False,
    **policy,
) -> tuple[LazySupervisedDataset, Report]:
    """Return the examples of annotation files, indexed and checked, and what the check found.

    policy: bad_record, max_bad_share, ledger_path, decode, before of check_annotations. num_workers: processes that
    count tokens the first time. picture_resize, placeholder_as_text: as in ExampleMaker.
    """
    annotations = open_annotations(data_path, image_folder, cache_dir, num_workers)
    encoder = RecordEncoder(tokenizer, conv_template, mm_use_im_start_end)
    report = check_annotations(
        annotations,
        encoder,
        layout,
        max_length,
        follow_links=follow_links,
        num_workers=num_workers,
        placeholder_as_text=placeholder_as_text,
        **policy,
    )
    dataset = LazySupervisedDataset(
        report.annotations,
        tokenizer,
        image_processor,
        encoder.template,
        image_folder,
        layout,
        max_length,
        mm_use_im_start_end,
        follow_links,
        picture_resize,
        placeholder_as_text,
    )
    return dataset, report
