"""Turn a record of an accelerometer and a gyroscope into the tensor that ImageBind reads."""

from __future__ import annotations

import numpy as np
import torch

from llava_lite.media.files import MediaError, check_finite, is_array_file, name_source, read_array, read_bytes


def load_imu(source, num_channels=6, num_samples=2000) -> torch.Tensor:
    """Return a record of the sensors, float32 [6, 2000]: x, y, z of the accelerometer, then of the gyroscope.

    source: path or bytes of .npy, of a tensor that torch saved, or of a table with a line a sample (commas or spaces,
    a header of names may come first); channels first or last. 2000 samples are 10 s at 200 Hz, as in Ego4D's clips;
    nothing is resampled. ImageBind published no loader. Raises MediaError with both shapes for another one.
    """
    data = read_bytes("imu", source)
    record = read_array("imu", source, data) if is_array_file(data) else read_table(source, data)
    if record.shape == (num_samples, num_channels):
        record = record.T
    if record.shape != (num_channels, num_samples):
        reason = (
            f"its shape is {record.shape}; the encoder reads [{num_channels}, {num_samples}], 10 s of both sensors at "
            "200 Hz. Cut and resample it."
        )
        raise MediaError("imu", name_source(source), reason)
    record = np.ascontiguousarray(record).astype(np.float32)
    check_finite("imu", source, record)
    return torch.from_numpy(record)


def read_table(source, data: bytes) -> np.ndarray:
    """Return the numbers of a table [samples, channels]."""
    rows = [line.replace(",", " ").split() for line in data.decode("utf-8", "replace").splitlines()]
    rows = [row for row in rows if row]
    try:
        float(rows[0][0])
    except ValueError:
        rows = rows[1:]
    except IndexError:
        pass
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        reason = "it is neither .npy, a tensor that torch saved, nor a table of numbers with equal lines."
        raise MediaError("imu", name_source(source), reason) from error
