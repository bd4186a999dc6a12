"""Refuse flags of a run in a sentence."""


def raise_if(condition, message):
    """Raise ValueError with `message` if `condition` holds."""
    if condition:
        raise ValueError(message)


def check_pair(condition, first, second):
    """Raise ValueError naming two flags, with their values, that cannot both hold."""
    raise_if(condition, f"--{first} and --{second} contradict each other; drop one.")
