"""Makes glibc's allocator keep freed memory for the next training step.

By default it returns large freed blocks to the kernel, and the next step pays for new, zeroed pages.
`python tests/bench/bench_allocator.py` measures the cost for CPU workers.
"""

import ctypes

# From malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc's maximum on 64-bit machines: larger tensors are still mapped and unmapped."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees. Returns False if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
