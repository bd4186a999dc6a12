"""Find pictures that have changed since the index learned of them: their files may be gone, cut short or replaced.

A second table beside that of the pictures holds a stamp of each file's size and time of change. A start asks for these
alone, 50 us a record with its own line (measured on local files; opening a picture takes three times that).
"""

import os
import zlib

import numpy as np

from llava_lite.data.facts import measure_records
from llava_lite.data.picture_files import PictureMeter, find_picture
from llava_lite.pictures import PictureError


class StampMeter:
    """Record -> a stamp of each picture's file as it is now, 0 for one that the record holds itself."""

    def __init__(self, follow_links: bool = False):
        self.follow_links = follow_links

    def __call__(self, record) -> tuple[int, ...]:
        """Return the stamps; PictureError where a file is not there."""
        return tuple(0 if isinstance(image, bytes) else self._stamp(record, image) for image in record.images)

    def _stamp(self, record, name: str) -> int:
        path = find_picture(record.image_folder, name, self.follow_links)[0]
        try:
            status = os.stat(path)
        except OSError as error:
            raise PictureError(path, f"{error.strerror}.") from error
        # 31 bits, so that it fits into a table in which -1 stands for unknown.
        return zlib.crc32(f"{path} {status.st_size} {status.st_mtime_ns}".encode()) >> 1


def look_again(
    annotations, name: str, num_columns: int, meter: PictureMeter, num_threads: int
) -> dict[int, Exception]:
    """Measure what has changed among the known pictures of the table `name`; return why records cannot be used.

    Sizes of pictures that cannot be used any more stay as they were: a run that goes on counts with them.
    """
    problems, stamp = {}, StampMeter(meter.follow_links)
    for file, positions, numbers in annotations.by_file():
        pictures = file.table(name, num_columns, per_picture=True)
        stamps = file.table(f"{name}-stamps", 1, per_picture=True)
        known = np.setdiff1d(positions[np.diff(pictures.starts)[positions] > 0], pictures.unknown(positions))
        changed, purpose = [], f"looking at pictures of {file.name} again"
        rows = stamps.rows()[:, 0]
        for measured in measure_records(file, known, stamp, purpose, num_threads=num_threads):
            changed += [position for position, _ in measured.problems]
            for position, found in zip(measured.positions, measured.rows, strict=True):
                seen = rows[stamps.starts[position] : stamps.starts[position + 1]]
                changed += [position] if (seen >= 0).all() and tuple(seen.tolist()) != found else []
        reasons = pictures.renew(file, np.array(sorted(changed), int), meter, purpose, num_threads=num_threads)
        fresh = np.setdiff1d(changed, list(reasons)).astype(int)
        fresh = np.union1d(fresh, np.setdiff1d(stamps.unknown(known), list(reasons))).astype(int)
        stamps.renew(file, fresh, stamp, purpose, num_threads=num_threads)
        for i in np.flatnonzero(np.isin(positions, list(reasons))) if reasons else ():
            problems[int(numbers[i])] = reasons[int(positions[i])]
    return problems
