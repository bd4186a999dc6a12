"""Measure the images of a record, and check the files of its media: the numbers of the table of images."""

from llava_lite.data.image_files import find_image, inspect_image
from llava_lite.data.media_files import check_kinds, inspect_mix
from llava_lite.data.records.media import MediaMix
from llava_lite.media.layout import ImageLayout


class ImageMeter:
    """Record -> (width, height, 0 or 1 for another suffix) of each image; of media together see inspect_mix.

    layout: how an image becomes features, and which media the tower reads.
    """

    def __init__(self, layout: ImageLayout, decode: bool = False, follow_links: bool = False):
        self.layout = layout
        self.decode = decode
        self.follow_links = follow_links

    @property
    def key(self) -> tuple:
        """What the numbers depend on beside the record: of images not on the tower, of media on what it reads."""
        layout = self.layout
        media = (layout.media, layout.crop_px, layout.aspect_ratio) if layout.media else ()
        return (self.decode, self.follow_links, *media)

    def __call__(self, record) -> tuple[int, ...]:
        """Return three numbers for each image; ImageError or MediaError for the first that cannot be used.

        ImportError with the record's name for a file that needs a package that is not installed: others will too.
        """
        numbers = []
        for image in record.images:
            source, has_other_suffix = image, False
            if isinstance(image, MediaMix):
                check_kinds(image, self.layout, record.name)
                numbers += self._inspect(record, image)
                continue
            if isinstance(image, str):
                source, has_other_suffix = find_image(record.image_folder, image, self.follow_links)
            numbers += [*inspect_image(source, self.decode), int(has_other_suffix)]
        return tuple(numbers)

    def _inspect(self, record, mix: MediaMix) -> tuple[int, int, int]:
        try:
            return inspect_mix(record.image_folder, mix, self.layout, self.decode, self.follow_links)
        except ImportError as error:
            raise ImportError(f"{record.name}: {error}") from error
