"""Conversion between the raw outputs of the anchor-free YOLO head and boxes.

Li et al., "Generalized focal loss", NeurIPS 2020 (a side's distance as the mean of a distribution over bins), as YOLOv8
and SpikeYOLO (Luo et al., ECCV 2024, section 3) use it. A level's output is [B, 4 * 16 + K, h, w]: the bins of left,
top, right and bottom, then the class logits. Anchor points are the centres of the cells. Boxes may extend beyond the
image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spikefleet_models.detection import wide
from spikefleet_models.spike_yolo.config import REG_MAX


class AnchorPoints(NamedTuple):
    """The centres of all cells, finest level first, rows before columns."""

    points: Tensor
    """[A, 2]: x y in pixels."""
    strides: Tensor
    """[A, 1]: side of the cell in pixels."""


def anchor_points(grids: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor) -> AnchorPoints:
    """Compute the centres of the cells of grids of (rows, columns), of the type and on the device of `like`."""
    points, sides = [], []
    for (rows, columns), stride in zip(grids, strides, strict=True):
        y = (torch.arange(rows, dtype=like.dtype, device=like.device) + 0.5) * stride
        x = (torch.arange(columns, dtype=like.dtype, device=like.device) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
        sides.append(points[-1].new_full((rows * columns, 1), stride))
    return AnchorPoints(torch.cat(points), torch.cat(sides))


def split_outputs(outputs: Sequence[Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    """Split the levels' [B, 4 * 16 + K, h, w] into bins [B, A, 4, 16] and class logits [B, A, K], in fp32 or fp64."""
    merged = wide(torch.cat([output.flatten(2) for output in outputs], dim=2)).transpose(1, 2)
    bins, logits = merged.split((4 * REG_MAX, num_classes), dim=2)
    return bins.unflatten(2, (4, REG_MAX)), logits


def expected_distances(bins: Tensor) -> Tensor:
    """Decode bins [..., 4, 16] to distances [..., 4] in cells to left, top, right, bottom: the mean of the softmax."""
    cells = torch.arange(REG_MAX, dtype=bins.dtype, device=bins.device)
    # A width of exactly 0, which a saturated softmax can give, has no aspect ratio and would make the CIoU NaN.
    return (bins.softmax(-1) @ cells).clamp_min(1e-4)


def distances_to_boxes(distances: Tensor, anchors: AnchorPoints) -> Tensor:
    """Convert distances in cells [..., A, 4] to boxes x1 y1 x2 y2 in pixels [..., A, 4]."""
    to_top_left, to_bottom_right = (distances * anchors.strides).chunk(2, dim=-1)
    return torch.cat((anchors.points - to_top_left, anchors.points + to_bottom_right), dim=-1)


def boxes_to_distances(boxes: Tensor, anchors: AnchorPoints) -> Tensor:
    """Convert boxes in pixels [..., A, 4] to distances in cells [..., A, 4]; negative where the point lies outside."""
    top_left, bottom_right = boxes.chunk(2, dim=-1)
    return torch.cat((anchors.points - top_left, bottom_right - anchors.points), dim=-1) / anchors.strides
