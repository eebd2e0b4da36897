"""Values that no run can have, refused by field before anything is built.

The limits of sections stand at their fields. These hold for every configuration, also of plugins: the size of numbers,
the characters of text, and the sizes of a network, which take time and memory just to be written down.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

_LARGEST = 2**63 - 1
"""Largest absolute value of any number: what tensors, JSON readers and databases take."""

_OF_NETWORKS: Mapping[str, float] = {
    "timesteps": 100_000,
    "bound": 255,
    "width": 1024,
    "depth": 1024,
    "stages": 256,
    "num_classes": 1_000_000,
    "in_channels": 65_536,
    "taps": 1024,
    "fpn_channels": 1_000_000,
    "box_channels": 1_000_000,
    "max_channels": 1_000_000,
    "neck_ratio": 1024,
    "scales_per_octave": 1024,
}
"""Largest value of a network's field by its name, in any section of `model`; in a list, of each element."""

_LONGEST_LIST = 10_000
_LONGEST_OF_NETWORKS = 64
_LONGEST_TEXT = 10_000


def beyond_limits(tree: Any, path: str = "") -> Iterator[str]:
    """Iterates over the values of a configuration that are beyond any limit.

    Args:
        tree: plain data.
        path: dotted key of it.

    Yields:
        A message for each: the key, the value, and what is allowed.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from beyond_limits(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        longest = _LONGEST_OF_NETWORKS if path.startswith("model.") else _LONGEST_LIST
        if len(tree) > longest:
            yield f"{path} has {len(tree):,} elements; at most {longest:,} are allowed"
            return
        for value in tree:
            yield from beyond_limits(value, path)
    elif isinstance(tree, str):
        yield from _text(tree, path)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        names = path.split(".")
        largest = _OF_NETWORKS.get(names[-1], _LARGEST) if names[0] == "model" else _LARGEST
        if not abs(tree) <= largest:
            yield f"{path}={str(tree)[:40]} is too large; at most {largest:,} is allowed"


def _text(text: str, path: str) -> Iterator[str]:
    if len(text) > _LONGEST_TEXT:
        yield f"{path} has {len(text):,} characters; at most {_LONGEST_TEXT:,} are allowed"
    elif odd := next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), ""):
        what = "a byte that is not UTF-8" if "\ud800" <= odd <= "\udfff" else f"the control character {odd!r}"
        yield f"{path}={text[:80]!r} has {what}; only Unicode text without them is allowed"
