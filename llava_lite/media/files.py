"""Read the bytes of a file of sound, motion or depth, and say in one sentence what is wrong with it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch

from llava_lite.hub.pickles import load_pickle

NPY_START, ZIP_START, PICKLE_START = b"\x93NUMPY", b"PK\x03\x04", b"\x80"


class MediaError(ValueError):
    """A file that cannot be used: its `kind` (audio, video, ...), `path` and `reason`."""

    def __init__(self, kind, path, reason):
        super().__init__(f"cannot use the {kind} {str(path)!r}: {reason}")
        self.kind, self.path, self.reason = kind, str(path), reason

    def __reduce__(self):
        """Pickle the parts, so that the error reaches the main process from a data-loader worker."""
        return type(self), (self.kind, self.path, self.reason)


def name_source(source) -> str:
    """Return how messages name a path, or bytes."""
    return f"{len(source)} bytes" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)


def read_bytes(kind: str, source) -> bytes:
    """Return the bytes of a path, or those given.

    Raises MediaError if there is no such file or it is empty, TypeError for a source that is neither.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        try:
            data = Path(source).expanduser().read_bytes()
        except FileNotFoundError as error:
            raise MediaError(kind, source, "there is no such file.") from error
        except (OSError, ValueError) as error:
            raise MediaError(kind, source, f"{type(error).__name__}: {error}") from error
    else:
        raise TypeError(f"{kind} is a path or the bytes of a file; got {type(source).__name__}.")
    if not data:
        raise MediaError(kind, name_source(source), "it is empty.")
    return data


def is_array_file(data: bytes) -> bool:
    """Tell whether a file begins as .npy or as what torch.save writes."""
    return data.startswith((NPY_START, ZIP_START, PICKLE_START))


def read_array(kind: str, source, data: bytes) -> np.ndarray:
    """Return the numbers of a .npy file, or of one tensor that torch saved; no code of the file is run.

    Raises MediaError for anything else.
    """
    try:
        if data.startswith(NPY_START):
            array = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            tensor = load_pickle(data)
            if not isinstance(tensor, torch.Tensor):
                reason = f"it holds a {type(tensor).__name__}, not one tensor. Save the tensor alone."
                raise MediaError(kind, name_source(source), reason)
            array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except MediaError:
        raise
    # The readers raise nearly every kind of error for a broken file.
    except Exception as error:
        reason = f"it cannot be read as an array ({type(error).__name__}: {str(error).splitlines()[0]})."
        raise MediaError(kind, name_source(source), reason) from error
    if array.dtype.kind not in "iuf":
        raise MediaError(kind, name_source(source), f"its values are {array.dtype}, not numbers.")
    return array


def check_finite(kind: str, source, array: np.ndarray) -> None:
    """Raise MediaError if a value is NaN or infinite."""
    wrong = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
    if wrong:
        raise MediaError(kind, name_source(source), f"{wrong} of its {array.size} values are NaN or infinite.")
