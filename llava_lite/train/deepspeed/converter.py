"""Run DeepSpeed's converter to universal checkpoints, which reads pickles, as a program that runs no code in them.

Started by `universal.convert` with FORCED in its environment, by which torch reads under `weights_only` whatever the
caller asks for.
"""

import os

import torch

from llava_lite.checkpoints.engine_files import allowed_states

FORCED = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
# What would undo it.
UNDOES = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# When it is imported, since the converter's own processes may import it again.
if FORCED.items() <= os.environ.items():
    torch.serialization.add_safe_globals(allowed_states())


def main() -> None:
    """Convert as the flags of DeepSpeed's program say."""
    from deepspeed.checkpoint import ds_to_universal

    if not FORCED.items() <= os.environ.items():
        raise SystemExit(
            f"set {' '.join('='.join(item) for item in FORCED.items())}: DeepSpeed would run what it reads."
        )
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
