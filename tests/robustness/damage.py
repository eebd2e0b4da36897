"""Seeded damage: what a disk, a network, an editor or an attacker does to a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_WORDS = (
    b"\0", b"\xff", b"\x80", b"\xed\xa0\x80", b"\n", b'"', b"[", b"]", b"{", b"}", b":", b",", b"-", b"1e999",
    b"99999999999999999999999999", b"null", b"true", b"NaN", b"\xef\xbb\xbf", b"\\ud800", b"\x1b[2J",
)  # fmt: skip

SEED = int(os.environ.get("FUZZ_SEED", "0"))
"""Of all fuzzers; `make fuzz` sets it."""

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""How long each fuzzer runs; 0: its own small number of inputs, in `make test`."""


def seeds(least: int) -> Iterator[int]:
    """Seeds of inputs: `least` of them, or as many as fit into SECONDS."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < least if not SECONDS else time.monotonic() < end:
        yield SEED * 1_000_003 + number
        number += 1
    print(f"tried {number:,} inputs from seed {SEED}")


def damaged(content: bytes, seed: int) -> bytes:
    """A file with a few of: changed, removed, repeated and inserted bytes, and a lost end."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        # Headers are short and matter most.
        at = int(rng.integers(0, max(1, len(data) if rng.random() < 0.6 else min(len(data), 80))))
        kind = rng.integers(0, 7)
        if kind < 2 and data:
            data[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 2 and data:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif kind == 5:
            data[at:at] = _WORDS[int(rng.integers(0, len(_WORDS)))]
        elif rng.random() < 0.4:
            del data[at:]
    return bytes(data)


def write_new(path: Path, content: bytes) -> None:
    """Writes a file anew: over its old content, ext4 would wait for the disk at each of thousands of inputs."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
