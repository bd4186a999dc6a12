"""Open sound and video that the standard library cannot read, with PyAV (FFmpeg in a wheel; the extra `media`)."""

from __future__ import annotations

import io
from contextlib import contextmanager

from llava_lite.media.files import MediaError, name_source


def check_decoder(source) -> None:
    """Raise ImportError with the extra if PyAV, which a path or bytes need, is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name_source(source)!r} needs PyAV to be decoded; it comes with: pip install 'llava-lite[media]'"
        ) from error


@contextmanager
def open_container(kind: str, source, data: bytes):
    """Yield the first stream of a kind ("audio" or "video") and its container.

    Raises ImportError with the extra if PyAV is not installed; MediaError if the file cannot be decoded or has no
    such stream, also for errors within the block.
    """
    check_decoder(source)
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise MediaError(kind, name_source(source), f"it has no {kind} stream.")
            yield streams[0], container
    except (av.FFmpegError, EOFError) as error:
        reason = f"it cannot be decoded ({type(error).__name__}: {error})."
        raise MediaError(kind, name_source(source), reason) from error
