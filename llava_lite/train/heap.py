"""Keep the memory that a step on the CPU frees, so that the next step need not ask the kernel for it again."""

import ctypes

# The parameters of mallopt(3), glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Larger blocks come from the kernel and go back to it. A higher limit lets them lie between small ones that stay, such
# as the kernels that oneDNN makes for every new shape, and the holes add up: at size S of the benchmarks in stage 2
# 1,650 MiB above the loaded model with 16 MiB, 1,430 with 8, and a fifth more time with 1.
LARGE_BYTES = 8 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether its C library can do so (glibc can).

    By itself glibc shrinks its heap whenever the end of it is free, and the next step finds empty pages there.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    values = {M_MMAP_THRESHOLD: LARGE_BYTES, M_TRIM_THRESHOLD: 2**31 - 1}
    return all(libc.mallopt(name, value) == 1 for name, value in values.items())
