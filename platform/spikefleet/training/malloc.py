"""glibc's allocator, told to keep the memory that one training step frees for the next.

By default it hands large blocks back to the kernel when they are free, and the next step pays for fresh, zeroed pages.
What that costs a training step on CPU workers is what `python tests/bench/bench_allocator.py` measures.
"""

import ctypes

# From malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc refuses more on 64-bit machines: tensors above 32 MiB are mapped and unmapped as before."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for good; False where the C library is not glibc, which has no such say."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
