"""Keep the memory that a step on the CPU frees, so that the next step need not ask the kernel for it again."""

import ctypes

# The parameters of mallopt(3), glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Larger blocks come from the kernel and go back to it, a page fault for each 4 KiB: with a limit of 8 MiB a quarter of
# the time of the benchmarks' size V in stage 3, whose gradients have 19 MiB. malloc by itself goes as far.
LARGE_BYTES = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether its C library can do so (glibc can).

    By itself glibc shrinks its heap whenever the end of it is free, and the next step finds empty pages there.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    values = {M_MMAP_THRESHOLD: LARGE_BYTES, M_TRIM_THRESHOLD: 2**31 - 1}
    return all(libc.mallopt(name, value) == 1 for name, value in values.items())
