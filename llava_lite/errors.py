"""Turn an error into the sentence that a person reads in the terminal."""


def get_sentence(error: BaseException) -> str:
    """Return the message of an error; an OSError that names its file in a field alone gets the file in front."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}."
    return str(error) or type(error).__name__
