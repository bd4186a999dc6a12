"""The error for data that cannot be used."""


class DataError(ValueError):
    """What is wrong in the data, where, and what to do about it."""
