"""Random damage of files, by a seed: flipped bits, cut ends, and JSON of another shape."""

from __future__ import annotations

import json
import random
from typing import Any

OTHERS: tuple[Any, ...] = (None, True, -1, 10**30, 0.5, float("nan"), "", "text", [], [1], {}, {"a": None}, "\ud800")


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    """One bit is another one."""
    changed = bytearray(content)
    position = draw.randrange(len(changed) * 8)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """A flipped bit, a cut end, other bytes, or nothing."""
    match draw.randrange(4):
        case 0:
            return flip_bit(content, draw)
        case 1:
            return content[: draw.randrange(len(content))]
        case 2:
            return draw.randbytes(draw.choice((0, 1, 40)))
        case _:
            return b"[" * 5000 if draw.random() < 0.3 else b"\xff\xfe" + content


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """The same JSON with one part removed, renamed or of another type."""
    tree = json.loads(content)
    places = list(_places(tree))
    if not places or draw.random() < 0.1:
        return json.dumps(draw.choice(OTHERS)).encode()
    parent, key = draw.choice(places)
    match draw.randrange(3):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[f"{key[:-1]}~"] = parent.pop(key)
        case _:
            parent[key] = draw.choice(OTHERS)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
