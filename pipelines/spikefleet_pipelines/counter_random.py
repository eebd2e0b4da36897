"""Counter-based random numbers: a draw is a pure function of (seed, epoch, sample index, draw number).

Nothing is stateful, so a draw depends neither on the number of loader processes nor on earlier draws, and one
vectorised call draws a whole batch. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), applied once for each part of the counter.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


class Draw(IntEnum):
    """Purposes of random numbers. Never change the meaning of a number: that would change every run."""

    ORDER = 0
    HOLD_OUT = 1
    CROP_Y = 2
    CROP_X = 3
    FLIP = 4
    CUTOUT_Y = 5
    CUTOUT_X = 6
    POLICY = 7
    POLICY_APPLY = 8  # two operations: 8 and 9
    POLICY_SIGN = 10  # two operations: 10 and 11
    BALANCE = 12
    MIX = 13  # whether an image is mixed, and how
    MIX_PARTNER = 14
    MIX_SHARE = 15
    RESIZED_CROP = 64  # 10 attempts of 4 numbers each: 64 to 103
    MOSAIC = 128
    MOSAIC_CENTRE = 129  # x and y: 129 and 130
    MOSAIC_PARTNER = 131  # three images: 131 to 133
    SCALE = 134
    TRANSLATE = 135  # x and y: 135 and 136
    HSV = 137  # hue, saturation, value: 137 to 139
    KEEP = 140
    SCENE = 1024  # layout of a scene: 1024 to 2047
    EVENT_SCENE = 2048  # what moves in front of the simulated event camera, and how: 2048 to 3071
    EVENT_PARTNERS = 3072  # recordings that a sample is made of, one number for each pair of classes: to 4095
    EVENT_AUGMENT = 4096  # which augmentations of events apply, and their sizes: 4096 to 4159
    SLICE_ORDER = 4160  # each time slice of a sample: 4160 to 5183
    SLICE_DELETION = 5184  # each time slice of a sample: 5184 to 6207
    FRAME_AUGMENT = 6208  # what becomes of the frames of a sample, and how much: 6208 to 6271
    EVENT_ZOOM = 6272  # whether, in or out, factor, x and y: 6272 to 6276
    STREAM_FILL = 7168  # recordings that fill a lane of a stream at the end of an epoch
    STREAM_RANDOM = 7169  # the random window of a lane in a step
    SCENE_NOISE = 1 << 20  # each value of a scene's background, below 1 << 21
    PIXEL_THRESHOLD = 1 << 24  # two for each pixel of the simulated event camera
    PIXEL_AGE = 1 << 26  # one for each pixel
    PIXEL_NOISE = 1 << 28  # four for each event of noise, below 1 << 32
    EVENT_DROP = 1 << 32  # one for each event, below 1 << 33
    EVENT_JITTER = 1 << 33  # two for each event, from here on


def random_bits(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike) -> NDArray[np.uint64]:
    """Draw 64 random bits for each (index, draw); `index` and `draw` are broadcast.

    Args:
        seed: of the run or of the data set.
        epoch: of training; 0 where there are no epochs.
        index: positions in the split.
        draw: numbers of `Draw`.
    """
    key = _mix_int(_mix_int(seed) + epoch * _GOLDEN)
    counter = np.atleast_1d(np.asarray(index, dtype=np.int64)).astype(np.uint64)
    number = np.atleast_1d(np.asarray(draw, dtype=np.int64)).astype(np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(np.uint64(key) + (counter + np.uint64(1)) * np.uint64(_GOLDEN))
        return _mix(bits + (number + np.uint64(1)) * np.uint64(_GOLDEN))


def uniform(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike) -> NDArray[np.float64]:
    """Draw numbers in [0, 1) with 53 random bits for each (index, draw); arguments as for `random_bits`."""
    return (random_bits(seed, epoch, index, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike, bound: int) -> NDArray[np.int64]:
    """Draw integers in [0, bound) for each (index, draw); arguments as for `random_bits`."""
    return (uniform(seed, epoch, index, draw) * bound).astype(np.int64)


def normal(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw two independent standard normal numbers for each (index, draw), from the numbers `draw` and `draw` + 1.

    The method is that of Box and Muller, "A note on the generation of random normal deviates", 1958. Arguments as for
    `random_bits`.
    """
    first = np.asarray(draw, dtype=np.int64)
    radius = np.sqrt(-2 * np.log1p(-uniform(seed, epoch, index, first)))
    angle = 2 * np.pi * uniform(seed, epoch, index, first + 1)
    return radius * np.cos(angle), radius * np.sin(angle)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return bits ^ (bits >> np.uint64(31))


def _mix_int(value: int) -> int:
    bits = (value + _GOLDEN) & _MASK
    bits = ((bits ^ (bits >> 30)) * _MULTIPLY_1) & _MASK
    bits = ((bits ^ (bits >> 27)) * _MULTIPLY_2) & _MASK
    return bits ^ (bits >> 31)
