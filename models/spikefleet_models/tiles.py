"""Cutting a [T, ...] tensor into pieces that stay in the second-level cache while T steps run over them.

Elementwise passes over a whole activation cost one trip to memory each; over a tile they cost a trip to the cache. On
accelerators a launch costs more than a pass, so there a tile is the whole tensor.
"""

from collections.abc import Iterator

from torch import Tensor

TILE_ELEMENTS = 1 << 19
"""Elements of one tile: 2 MiB of fp32. Measured in models/README.md."""


def tiles(tensor: Tensor, axis: int) -> Iterator[slice]:
    """Slices of `axis` that cut `tensor` into tiles of about TILE_ELEMENTS; one slice on accelerators."""
    length = tensor.shape[axis]
    step = length
    if tensor.device.type == "cpu":
        step = max(1, TILE_ELEMENTS * length // max(tensor.numel(), 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
