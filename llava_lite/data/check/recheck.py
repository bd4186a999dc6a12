"""Find images whose files have changed since they were checked: removed, truncated, replaced, or no longer readable.

The table of images holds a stamp of each file: its path, size, modification time and change time. The last is set by
the system with every change, also by one that restores the others, such as `cp -p` or `chmod`. A start looks at the
status of each file and opens only those whose stamp is another: 40,000 files a second on a local disk and two busy
cores (benchmarks/check.py), whatever the size of a record.
"""

import os
import stat
import zlib

import numpy as np

from llava_lite.data.check.image_meter import ImageMeter
from llava_lite.data.check.image_names import open_names
from llava_lite.data.image_files import safe_path
from llava_lite.data.index.annotations import IMAGE_COLUMNS
from llava_lite.data.index.tables import measure_records
from llava_lite.data.media_files import find_part
from llava_lite.data.records.media import MediaMix, MediaPart
from llava_lite.media.image import ImageError

# For a table of int32 in which -1 is unknown.
_31_BITS = 2**31 - 1


class StampMeter:
    """Record -> two numbers for each image: a stamp of its file as it is now, and its size in bytes.

    The stamp of one that the record itself holds is 0. Media that together are an image have one stamp and one size of
    all their files. One object serves one check: it remembers which directories lie below the image folder.
    """

    def __init__(self, follow_links: bool = False):
        self.follow_links = follow_links
        self._directories = {}

    def __call__(self, record) -> tuple[int, ...]:
        """Return two numbers for each image; ImageError or MediaError if a file does not exist."""
        return tuple(number for image in record.images for number in self._stamp(record, image))

    def _stamp(self, record, image: str | bytes | MediaMix) -> tuple[int, int]:
        if isinstance(image, bytes):
            return 0, len(image) & _31_BITS
        parts = image.parts if isinstance(image, MediaMix) else (MediaPart("image", image),)
        states = [self._state(record, part) for part in parts]
        stamp = zlib.crc32(" ".join(state for state, _ in states).encode("utf-8", "surrogatepass"))
        return stamp >> 1, sum(num_bytes for _, num_bytes in states) & _31_BITS

    def _state(self, record, part: MediaPart) -> tuple[str, int]:
        path, status = self._plain_file(record.image_folder, part.path)
        if status is None:
            # A link, another suffix, or a file that is gone.
            path = find_part(record.image_folder, part, self.follow_links)[0]
            try:
                status = os.stat(path)
            except OSError as error:
                raise ImageError(path, f"{error.strerror}.") from error
        return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}", status.st_size

    def _plain_file(self, image_folder: str | None, name: str) -> tuple[str, os.stat_result | None]:
        """Return path and status of a regular file in a directory below the image folder; None for all else."""
        directory, _, base = name.rpartition("/")
        prefix = self._directories.get((image_folder, directory))
        if prefix is None:
            prefix = self._directories[image_folder, directory] = self._prefix(image_folder, directory)
        if not prefix or not base or "\\" in base or "\x00" in base:
            return name, None
        path = prefix + base
        try:
            status = os.lstat(path)
        except OSError:
            return path, None
        return path, status if stat.S_ISREG(status.st_mode) else None

    def _prefix(self, image_folder: str | None, directory: str) -> str:
        """Return the path of a directory of images with its slash; "" if safe_path must decide on each file."""
        if image_folder is None or os.path.isabs(directory):
            return ""
        try:
            return os.path.join(safe_path(image_folder, directory, self.follow_links), "")
        except ImageError:
            return ""


class StampedMeter:
    """Record -> the five numbers of each image in the table: three of an ImageMeter, two of a StampMeter."""

    def __init__(self, meter: ImageMeter):
        self.meter, self.stamp = meter, StampMeter(meter.follow_links)

    def __call__(self, record) -> tuple[int, ...]:
        """Return the numbers; raise as the ImageMeter does."""
        try:
            # Before the file is opened: one that changes meanwhile has another stamp at the next check.
            stamps = self.stamp(record)
        except ValueError:
            # Its reason names what is wrong with the record, too.
            self.meter(record)
            raise
        numbers = self.meter(record)
        pairs = zip(range(0, len(numbers), 3), range(0, len(stamps), 2), strict=True)
        return tuple(number for k, j in pairs for number in (*numbers[k : k + 3], *stamps[j : j + 2]))


def recheck_images(annotations, name: str, meter: StampedMeter, num_threads: int) -> dict[int, ValueError]:
    """Measure the changed images of the table `name` again; return the reason for each record that cannot be used.

    An image that can no longer be used keeps its numbers in the table: a resumed run depends on its size.
    """
    problems = {}
    for file, positions, numbers in annotations.by_file():
        images = file.table(name, IMAGE_COLUMNS, per_image=True)
        known = np.setdiff1d(positions[np.diff(images.starts)[positions] > 0], images.unknown(positions))
        changed, purpose = [], f"checking changed images of {file.name}"
        stamps, starts = images.known_rows()[:, -2:].reshape(-1).tolist(), (2 * images.starts).tolist()
        named = open_names(file, num_threads) if len(known) else file
        for measured in measure_records(named, known, meter.stamp, purpose, num_threads=num_threads):
            changed += [position for position, _ in measured.problems]
            for position, found in zip(measured.positions, measured.rows, strict=True):
                if tuple(stamps[starts[position] : starts[position + 1]]) != found:
                    changed.append(position)
        reasons = images.renew(file, np.array(sorted(changed), int), meter, purpose, num_threads=num_threads)
        for i in np.flatnonzero(np.isin(positions, list(reasons))) if reasons else ():
            problems[int(numbers[i])] = reasons[int(positions[i])]
    return problems
