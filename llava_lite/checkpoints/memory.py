"""Compare the memory that a checkpoint's weights need with what is free, before they are loaded."""

import math
import re
from pathlib import Path


def free_ram(proc="/proc/meminfo", group="/sys/fs/cgroup"):
    """Return the free bytes of this machine, or of the container of this process."""
    lines = dict(line.split(":") for line in Path(proc).read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(group, f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    # Cached files count as used, and are dropped when memory is needed.
    stat = Path(group, "memory.stat")
    kinds = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    reclaimable = int(kinds.get("inactive_file", 0))
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + reclaimable))


def weight_bytes(checkpoint, bits: int | None = None, widens_half: bool = False) -> int:
    """Return the bytes of a checkpoint's weights once they are loaded, by the headers of its files.

    bits: of a quantised weight, None for the stored dtype. widens_half: float16 becomes float32. A vision tower that
    the checkpoint only names is not counted.
    """
    return sum(
        count * bits // 8 if bits is not None else count * (4 if is_half and widens_half else width)
        for count, width, is_half in _weights(checkpoint)
    )


def _weights(checkpoint):
    """Yield (number of values, bytes of a value, is float16) of each weight; safetensors come first."""
    from safetensors import safe_open

    from llava_lite.checkpoints.copying import read_weights
    from llava_lite.checkpoints.files import PICKLED, SAFE, find_weight_files

    files = find_weight_files(checkpoint, SAFE)
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for one in (weights.get_slice(name) for name in weights.keys()):  # noqa: SIM118
                dtype = one.get_dtype()
                yield math.prod(one.get_shape()), int(re.sub(r"\D*(\d+).*", r"\1", dtype)) // 8, dtype == "F16"
    for file in [] if files else find_weight_files(checkpoint, PICKLED):
        for one in read_weights(file).values():
            yield one.numel(), one.element_size(), str(one.dtype) == "torch.float16"


def check_fits(name: str, needed: int, free: float) -> None:
    """Raise ValueError for weights that need more bytes than are free."""
    if needed > free:
        raise ValueError(
            f"{name!r} needs {shown(needed)} of memory for its weights, and {shown(free)} are free on this machine. "
            "Free some, load it in fewer bits (load_4bit=True), or use a machine with more."
        )


def shown(num_bytes: float) -> str:
    """Return bytes as messages write them."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
