"""Turn annotation files into a data set: examples by number, made when they are asked for."""

from PIL import Image
from torch.utils.data import Dataset

from llava_lite.conversation import Conversation
from llava_lite.data.check.check import BadRecord, Report, check_annotations, get_path
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.examples import CLIP_336, ExampleMaker
from llava_lite.data.feature_cache import DamagedFeatures, FeatureView
from llava_lite.data.image_files import find_image, open_record_image
from llava_lite.data.index.annotations import Annotations, open_annotations
from llava_lite.data.index.cache import file_key, get_key
from llava_lite.data.media_files import LoadedMix, load_mix
from llava_lite.data.reading import ReadingNotes
from llava_lite.data.records.media import MediaMix
from llava_lite.data.records.record import Record
from llava_lite.data.skipped import LeftOut
from llava_lite.media.files import MediaError
from llava_lite.media.image import ImageError
from llava_lite.media.layout import ImageLayout
from llava_lite.media.resize import Resize


class LazySupervisedDataset(ExampleMaker, Dataset):
    """Examples made on demand; a worker receives only paths, the tokenizer and the image processor.

    The arguments are those of ExampleMaker; image_folder: for annotation files without their own. features: of all
    images of these records, if they are cached; images are then neither opened nor encoded. left_out: the records that
    a run leaves out; with it, a record that cannot be read becomes an empty example with the reason under "left_out".
    reading: where to note which record is read.
    """

    features: FeatureView | None = None
    left_out: LeftOut | None = None
    reading: ReadingNotes | None = None

    def __init__(
        self,
        annotations: Annotations,
        tokenizer,
        image_processor,
        conv_template: str | Conversation,
        image_folder: str | None = None,
        layout: ImageLayout = CLIP_336,
        max_length: int = 2048,
        mm_use_im_start_end: bool = False,
        follow_links: bool = False,
        image_resize: Resize | None = None,
        placeholder_as_text: bool = False,
        injection: str = "tokens",
        image_position: str = "placeholder",
    ):
        super().__init__(
            tokenizer,
            image_processor,
            conv_template,
            layout,
            max_length,
            mm_use_im_start_end,
            image_resize,
            placeholder_as_text,
            injection,
            image_position,
        )
        if image_processor is None and annotations.has_image.any():
            raise ValueError("records have images but there is no image processor; name a tower with --vision_tower.")
        self.annotations = annotations
        self.image_folder = image_folder
        self.follow_links = follow_links

    def __len__(self):
        return len(self.annotations)

    # Not set_epoch: accelerate's loader calls that with its own count, which begins with 0 after a resume.
    def begin_epoch(self, epoch: int) -> None:
        """Tell the data set and its workers the epoch, before a loader begins to read it."""
        if self.crops is not None:
            self.crops.begin(epoch)

    def __getitem__(self, i: int | tuple[int, ...]) -> dict | list[dict]:
        """Return the example of record i, or those of a pack of records.

        DataError if one cannot be used, unless `left_out` is set; the check before the run finds most of these.
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
        """Return the example of record i; DataError if it cannot be used."""
        if self.reading is None:
            return self._read(i)
        file, position = self.annotations.place(i)
        self.reading.begin(f"{file.name}[{position}]")
        try:
            return self._read(i)
        finally:
            self.reading.end()

    def _read(self, i: int) -> dict:
        record = self.annotations[i]
        if self.features is None:
            images = [self.open(record, image) for image in record.images]
            return self.example(record, images, self.annotations.number(i))
        return {"image_features": [], **self.example(record, self.features[i])}

    def _empty(self, i: int) -> dict:
        file, position = self.annotations.place(i)
        # By this key the model knows that the tower runs on no rank.
        features = {} if self.features is None else {"image_features": []}
        return features | self.empty(f"{file.name}[{position}]")

    def problem(self, i: int, error: ValueError) -> dict:
        """Return the entry of record i in the skipped-records log: its number, file, position, id and the reason."""
        kind = "image" if isinstance(error.__cause__, (ImageError, MediaError)) else "record"
        kind = "features" if isinstance(error, DamagedFeatures) else kind
        try:
            record_id = self.annotations[i].id
        except DataError:
            record_id = None
        file, position = self.annotations.place(i)
        bad = BadRecord(file.source.path, position, record_id, kind, str(error), get_path(error.__cause__))
        return {"place": self.annotations.number(i), **bad._asdict()}

    def open(self, record: Record, image: str | bytes | MediaMix) -> Image.Image | LoadedMix:
        """Return an image of a record, or its media; DataError with the name of the record if it cannot be used."""
        if self.reading is not None:
            name = f", image {image!r}" if isinstance(image, str) else ""
            self.reading.begin(f"{record.name}{name}")
        if isinstance(image, MediaMix):
            directory = record.image_folder or self.image_folder
            return load_mix(directory, image, self.layout, record.name, self.follow_links)
        try:
            return open_record_image(image if isinstance(image, bytes) else self.image_path(record, image))
        except ImageError as error:
            raise DataError(f"{record.name}: {error}") from error

    @property
    def sources(self) -> list[tuple[str, int]]:
        """The name of each file and the number of its records in use; for the model card."""
        return [(file.name, len(positions)) for file, positions, _ in self.annotations.by_file()]

    def image_key(self, record: Record, image: str | bytes) -> str:
        """Return a key for the content of an image: of its file as it is now, or of its bytes.

        DataError with the name of the record if there is no such file.
        """
        if isinstance(image, bytes):
            return get_key(image)
        try:
            path = self.image_path(record, image)
            try:
                return file_key(path)
            except OSError as error:
                raise ImageError(path, f"{error.strerror}.") from error
        except ImageError as error:
            raise DataError(f"{record.name}: {error}") from error

    def image_path(self, record: Record, name: str) -> str:
        """Return the path of an image of a record; ImageError if there is no such file."""
        return find_image(record.image_folder or self.image_folder, name, self.follow_links)[0]

    @property
    def lengths(self):
        """Tokens of each example, [N], from the index; for the sampler."""
        return self.annotations.token_lengths.clip(max=self.max_length)

    @property
    def checksums(self):
        """A checksum of the content of each record, [N], from the index; images count by their names."""
        return self.annotations.record_facts().checksum

    @property
    def image_bytes(self):
        """The size in bytes of each image's file, [S], from the index."""
        return self.annotations.image_bytes

    @property
    def groups(self) -> list[str] | None:
        """The group of each example, [N], if its file names one; for the sampler."""
        return self.annotations.groups if self.annotations.has_groups else None

    @property
    def has_image(self):
        """Which examples have images, [N] bool; for the sampler."""
        return self.annotations.has_image


def open_dataset(
    data_path,
    tokenizer,
    image_processor,
    conv_template: str | Conversation,
    image_folder: str | None = None,
    layout: ImageLayout = CLIP_336,
    max_length: int = 2048,
    mm_use_im_start_end: bool = False,
    follow_links: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
    image_resize: Resize | None = None,
    placeholder_as_text: bool = False,
    injection: str = "tokens",
    image_position: str = "placeholder",
    **policy,
) -> tuple[LazySupervisedDataset, Report]:
    """Return the examples of annotation files, indexed and checked, and what the check found.

    policy: bad_record, max_bad_fraction, skipped_log_path, decode, before of check_annotations. num_workers: processes
    that count tokens the first time. image_resize, placeholder_as_text: as in ExampleMaker. injection, image_position:
    as in RecordEncoder.
    """
    annotations = open_annotations(data_path, image_folder, cache_dir, num_workers)
    encoder = RecordEncoder(tokenizer, conv_template, mm_use_im_start_end, injection, image_position)
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
        image_resize,
        placeholder_as_text,
        injection,
        image_position,
    )
    return dataset, report
