"""Find images whose files have changed since they were indexed: removed, truncated or replaced.

A second table beside that of the images holds a stamp of each file's size and modification time. A start reads only
these, in 50 us a record (measured on local files; to open an image takes three times as long).
"""

import os
import zlib

import numpy as np

from llava_lite.data.check.image_meter import ImageMeter
from llava_lite.data.index.tables import measure_records
from llava_lite.data.media_files import find_part
from llava_lite.data.records.media import MediaMix, MediaPart
from llava_lite.media.image import ImageError


class StampMeter:
    """Record -> a stamp of each image's file as it is now, 0 for one that the record itself holds.

    Media that together are an image have one stamp of all their files.
    """

    def __init__(self, follow_links: bool = False):
        self.follow_links = follow_links

    def __call__(self, record) -> tuple[int, ...]:
        """Return the stamps; ImageError or MediaError if a file does not exist."""
        return tuple(0 if isinstance(image, bytes) else self._stamp(record, image) for image in record.images)

    def _stamp(self, record, image: str | MediaMix) -> int:
        parts = image.parts if isinstance(image, MediaMix) else (MediaPart("image", image),)
        # 31 bits, for a table of int32 in which -1 is unknown.
        return zlib.crc32(" ".join(self._state(record, part) for part in parts).encode()) >> 1

    def _state(self, record, part: MediaPart) -> str:
        path = find_part(record.image_folder, part, self.follow_links)[0]
        try:
            status = os.stat(path)
        except OSError as error:
            raise ImageError(path, f"{error.strerror}.") from error
        return f"{path} {status.st_size} {status.st_mtime_ns}"


def recheck_images(annotations, name: str, num_columns: int, meter: ImageMeter, num_threads: int) -> dict:
    """Measure the changed images of the table `name` again; return the reason for each record that cannot be used.

    An image that can no longer be used keeps its size in the table: a resumed run depends on it.
    """
    problems, stamp = {}, StampMeter(meter.follow_links)
    for file, positions, numbers in annotations.by_file():
        images = file.table(name, num_columns, per_image=True)
        stamps = file.table(f"{name}-stamps", 1, per_image=True)
        known = np.setdiff1d(positions[np.diff(images.starts)[positions] > 0], images.unknown(positions))
        changed, purpose = [], f"checking changed images of {file.name}"
        rows = stamps.known_rows()[:, 0]
        for measured in measure_records(file, known, stamp, purpose, num_threads=num_threads):
            changed += [position for position, _ in measured.problems]
            for position, found in zip(measured.positions, measured.rows, strict=True):
                seen = rows[stamps.starts[position] : stamps.starts[position + 1]]
                changed += [position] if (seen >= 0).all() and tuple(seen.tolist()) != found else []
        reasons = images.renew(file, np.array(sorted(changed), int), meter, purpose, num_threads=num_threads)
        fresh = np.setdiff1d(changed, list(reasons)).astype(int)
        fresh = np.union1d(fresh, np.setdiff1d(stamps.unknown(known), list(reasons))).astype(int)
        stamps.renew(file, fresh, stamp, purpose, num_threads=num_threads)
        for i in np.flatnonzero(np.isin(positions, list(reasons))) if reasons else ():
            problems[int(numbers[i])] = reasons[int(positions[i])]
    return problems
