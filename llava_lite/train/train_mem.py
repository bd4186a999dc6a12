"""LLaVA's name for the script that `deepspeed`, `torchrun` and `accelerate launch` start."""

import sys
from pathlib import Path


def __getattr__(name):
    """Return `train`, which LLaVA's file imports."""
    if name == "train":
        from llava_lite.train.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    # A launcher puts this directory first on the path, where `train.py` and its neighbours would pass for packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from llava_lite.train.train import main

    main()
