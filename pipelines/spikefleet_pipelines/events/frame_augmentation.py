"""Augmentation of frames [T, C, H, W] of events; all slices of a sample are changed alike.

What is random is a function of (seed, epoch, sample). Values are moved, never interpolated, so counts stay counts.

* NDA: Li, Kim, Park, Geller and Panda, "Neuromorphic data augmentation for training spiking neural networks", ECCV
  2022: one of roll, rotation and shear, with equal probability.
* CutMix: Yun, Han, Oh, Chun, Choe and Yoo, "CutMix: regularization strategy to train strong classifiers with
  localizable features", ICCV 2019, with lambda from Beta(1, 1), which is uniform. Deviation: the partner of a sample is
  a random one of the split, not of the batch, so that it does not depend on the number of workers.
* Cutout: DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, uniform
from spikefleet_pipelines.events.augmentation import Sample
from spikefleet_pipelines.events.frame_augmentation_config import NDA_LIMITS

Area = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle of pixels."""

# Numbers of one sample, from Draw.FRAME_AUGMENT on.
_KIND, _SIZE, _CUTOUT, _MIX = 0, 1, 3, 5


class Mix(NamedTuple):
    """How a sample is mixed with another one."""

    partner: int
    """Position in the split."""
    area: Area
    """What becomes the partner's."""
    share: float
    """Of the partner in the label: that of the area in the frame."""


def nda(frames: Tensor, data_set: str, sample: Sample, fill: Tensor | float = 0) -> Tensor:
    """Apply exactly one of roll, rotation and shear, with a size that is uniform up to the limit (NDA).

    Args:
        frames: [T, C, H, W].
        data_set: name of the limits, a key of `NDA_LIMITS`.
        sample: the numbers of the sample.
        fill: value where a frame has no pixel, a number or [C, 1, 1].
    """
    limits = NDA_LIMITS[data_set]
    kind, *sizes = _draws(sample, _KIND, 3)
    if kind < 1 / 3:
        most = [round(limits.roll * side) for side in frames.shape[-2:]]
        return roll(frames, [int(size * (2 * limit + 1)) - limit for size, limit in zip(sizes, most, strict=True)])
    part = 2 * sizes[0] - 1
    if kind < 2 / 3:
        return rotate(frames, part * limits.rotation, fill)
    return shear(frames, part * limits.shear, fill)


def roll(frames: Tensor, by: Sequence[int]) -> Tensor:
    """Move frames by whole pixels down and right; what leaves at one side comes in at the opposite one.

    Args:
        frames: [..., H, W].
        by: pixels down and right.
    """
    return frames.roll(tuple(by), (-2, -1))


def rotate(frames: Tensor, degrees: float, fill: Tensor | float = 0) -> Tensor:
    """Turn frames counter-clockwise around their centre, by the nearest pixel.

    Args:
        frames: [..., C, H, W].
        degrees: the angle.
        fill: value where a frame has no pixel, a number or [C, 1, 1].
    """
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    return _resampled(frames, ((cos, sin), (-sin, cos)), fill)


def shear(frames: Tensor, degrees: float, fill: Tensor | float = 0) -> Tensor:
    """Shear frames along their rows: a row moves left by the tangent of the angle for each row below the centre.

    Args:
        frames: [..., C, H, W].
        degrees: the angle.
        fill: value where a frame has no pixel, a number or [C, 1, 1].
    """
    return _resampled(frames, ((1.0, 0.0), (math.tan(math.radians(degrees)), 1.0)), fill)


def cutout(frames: Tensor, side: float, sample: Sample, fill: Tensor | float = 0) -> Tensor:
    """Fill a square around a random pixel, the same in all slices; its part outside the frames is cut off.

    Args:
        frames: [..., C, H, W].
        side: of the square, of the shorter side of the frames, 0 to 1.
        sample: the numbers of the sample.
        fill: value of the square, a number or [C, 1, 1].
    """
    height, width = frames.shape[-2:]
    length = round(side * min(height, width))
    down, right = _draws(sample, _CUTOUT, 2)
    top, left = int(down * height) - length // 2, int(right * width) - length // 2
    changed = frames.clone()
    changed[..., max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = fill
    return changed


def draw_mix(probability: float, samples: int, size: tuple[int, int], sample: Sample) -> Mix | None:
    """Draw how a sample is mixed with another one of its split (CutMix).

    Args:
        probability: of being mixed at all.
        samples: number of samples of the split.
        size: height and width of the frames.
        sample: the numbers of the sample.

    Returns:
        Partner, area and share; None if the sample stays as it is. The area is that of a rectangle of the frame's
        proportions with a uniform share of it, around a random pixel, without its part outside.
    """
    chance, partner, share, *centre = _draws(sample, _MIX, 5)
    if chance >= probability:
        return None
    edges = []
    for length, place in zip(size, centre, strict=True):
        part, middle = int(length * math.sqrt(share)), int(place * length)
        edges.append((max(middle - part // 2, 0), min(middle - part // 2 + part, length)))
    (top, bottom), (left, right) = edges
    area = top, left, bottom - top, right - left
    return Mix(int(partner * samples), area, area[2] * area[3] / (size[0] * size[1]))


def cut_mix(frames: Tensor, partner: Tensor, area: Area) -> Tensor:
    """Replace a rectangle in all slices by that of another sample.

    Args:
        frames: [T, C, H, W].
        partner: frames of the other sample, of the same shape.
        area: of the rectangle.

    Raises:
        ValueError: the frames have different shapes.
    """
    if frames.shape != partner.shape:
        raise ValueError(f"cut_mix: frames are {list(frames.shape)} and {list(partner.shape)}, expected equal shapes")
    top, left, height, width = area
    mixed = frames.clone()
    rows, columns = slice(top, top + height), slice(left, left + width)
    mixed[..., rows, columns] = partner[..., rows, columns]
    return mixed


def mixed_classes(labels: Tensor, partners: Tensor, shares: Tensor, classes: int) -> Tensor:
    """Return the classes of mixed samples as probabilities, float32 [B, K], for a cross entropy.

    Args:
        labels: class of each sample, int64 [B].
        partners: class of its partner, int64 [B]; its own where it is not mixed.
        shares: of the partner, [B]; 0 where it is not mixed.
        classes: number K of classes.
    """
    own, other = (torch.nn.functional.one_hot(one, classes).to(torch.float32) for one in (labels, partners))
    part = shares.to(torch.float32)[:, None]
    return own * (1 - part) + other * part


def _draws(sample: Sample, first: int, count: int) -> list[float]:
    numbers: list[float] = uniform(*sample, Draw.FRAME_AUGMENT + first + np.arange(count)).tolist()
    return numbers


Matrix = tuple[tuple[float, float], tuple[float, float]]


def _resampled(frames: Tensor, matrix: Matrix, fill: Tensor | float) -> Tensor:
    """Take each pixel from the nearest place that a matrix maps its place to.

    Args:
        frames: [..., C, H, W].
        matrix: maps (down, right) from the centre of the result to that of the frames.
        fill: where that place is outside.
    """
    height, width = frames.shape[-2:]
    down = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    rows, columns = (
        torch.floor(one * down + other * right + (length - 1) / 2 + 0.5).to(torch.int64)
        for (one, other), length in zip(matrix, (height, width), strict=True)
    )
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = frames[..., rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return torch.where(inside, moved, torch.as_tensor(fill, dtype=frames.dtype))
