"""Fuzzing by seeds: what a disk, a network, an editor or an attacker does to a file, and the loop that reads it."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = int(os.environ.get("FUZZ_SEED", "0"))
"""Of all fuzzers; `make fuzz` sets it."""

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""How long each fuzzer runs; 0: its own small number of inputs, in `make test`."""

LONGEST_S = 10.0
"""No input may take longer."""

Change = Callable[[bytes, random.Random], bytes]
"""Damages a file."""

_WORDS = (
    b"\0", b"\xff", b"\x80", b"\xed\xa0\x80", b"\n", b'"', b"[", b"]", b"{", b"}", b":", b",", b"-", b"1e999",
    b"99999999999999999999999999", b"null", b"true", b"NaN", b"\xef\xbb\xbf", b"\\ud800", b"\x1b[2J", b"[" * 5000,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 0.5, 10**30, 1e308, float("nan"), "", "text", "\ud800", "\x1b[31m", [], [1], [[]], {},
    {"a": 1}, {"a": None}, [None], ["a", 2], {"family": "x"}, [[1, 2], [3]], "a" * 3000,
)  # fmt: skip


def seeds(least: int) -> Iterator[int]:
    """Seeds of inputs: `least` of them, or as many as fit into SECONDS."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < least if not SECONDS else time.monotonic() < end:
        yield SEED * 1_000_003 + number
        number += 1
    print(f"tried {number:,} inputs from seed {SEED}")


def draws(least: int) -> Iterator[random.Random]:
    """As `seeds`: a random generator for each input."""
    return (random.Random(seed) for seed in seeds(least))


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    """One bit is another one."""
    changed = bytearray(content)
    position = draw.randrange(len(changed) * 8)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with a few of: changed, removed, repeated and inserted bytes, and a lost end."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        # Headers are short and matter most.
        at = draw.randrange(max(1, len(data) if draw.random() < 0.6 else min(len(data), 80)))
        kind = draw.randrange(7)
        if kind < 2 and data:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
        elif kind == 5:
            data[at:at] = draw.choice(_WORDS)
        elif draw.random() < 0.4:
            del data[at:]
    return bytes(data)


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """The same JSON with one or two parts removed, added, renamed or of another type."""
    tree = json.loads(content)
    for _ in range(draw.randint(1, 2)):
        places = list(_places(tree))
        if not places or draw.random() < 0.03:
            return json.dumps(_value(draw)).encode()
        parent, key = draw.choice(places)
        match draw.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[f"{key[:-1]}~"] = parent.pop(key)
            case 2 if isinstance(parent, dict):
                parent[draw.choice(("x", "model", "\ud800"))] = 1
            case _:
                parent[key] = _value(draw)
    return json.dumps(tree).encode()


def _value(draw: random.Random) -> Any:
    """A copy: what is put into a tree may be damaged next."""
    return copy.deepcopy(draw.choice(_VALUES))


def damage_text(content: bytes, draw: random.Random) -> bytes:
    """JSON of another shape, or other bytes."""
    return damage_json(content, draw) if draw.random() < 0.7 else damaged(content, draw)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def write_new(path: Path, content: bytes) -> None:
    """Writes a file anew: over its old content, ext4 would wait for the disk at each of thousands of inputs."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def try_all(
    whole: bytes,
    read: Callable[[bytes], object],
    count: int,
    change: Change,
    refusals: tuple[type[Exception], ...],
    one_line: bool = True,
) -> int:
    """Reads damaged copies of a file: each is read, or refused with one line.

    Args:
        whole: the file, which is read.
        read: reads it.
        count: of damaged copies in `make test`.
        change: damages it.
        refusals: exceptions that the command line shows as a sentence; ValueError stands for itself, not for its
            subclasses, such as UnicodeDecodeError.
        one_line: the sentence has one line.

    Returns:
        How many are refused.

    Raises:
        AssertionError: another exception, a message of several lines, or a copy that took too long.
    """
    assert error_of(read, whole) is None, "the intact one is read"
    refused = 0
    for seed in seeds(count):
        content, start = change(whole, random.Random(seed)), time.monotonic()
        error = error_of(read, content)
        assert time.monotonic() - start < LONGEST_S, f"seed {seed} took too long"
        if error is None:
            continue
        shown = f"{error!r}\n{content[:3000]!r}"
        assert any(_is(error, refusal) for refusal in refusals), f"seed {seed} is a traceback: {shown}"
        assert str(error).strip(), f"seed {seed} has no message: {shown}"
        assert not one_line or "\n" not in str(error), f"seed {seed} is more than a line: {shown}"
        refused += 1
    return refused


def _is(error: Exception, refusal: type[Exception]) -> bool:
    return type(error) is refusal if refusal is ValueError else isinstance(error, refusal)


def error_of(read: Callable[[bytes], object], content: bytes) -> Exception | None:
    """What reading raises."""
    try:
        read(content)
    except Exception as error:
        return error
    return None
