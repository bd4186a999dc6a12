"""One object of an annotation file as a Record, in any of the spellings that are read."""


def __getattr__(name):
    """Return `open_sources`, which stands on the files of this directory and is imported when it is asked for."""
    if name == "open_sources":
        from llava_lite.data.index.sources import open_sources

        return open_sources
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
