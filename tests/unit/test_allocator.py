"""Freed memory is kept: what a step frees, the next one finds without asking the kernel."""

import subprocess
import sys

import pytest

PAGES_OF_A_BLOCK = 4096
CODE = """
import ctypes, resource, sys
from spikefleet.training.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks = [libc.malloc(16 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 16 << 20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_kept_blocks_cost_their_pages_once() -> None:
    """Four blocks of 16 MiB, ten times: glibc lets go of most each time, although its thresholds grow."""
    faults = {
        choice: int(subprocess.run([sys.executable, "-c", CODE, choice], capture_output=True, check=True).stdout)
        for choice in ("default", "keep")
    }
    assert faults["keep"] < 1.5 * 4 * PAGES_OF_A_BLOCK
    assert faults["default"] > 4 * faults["keep"]
