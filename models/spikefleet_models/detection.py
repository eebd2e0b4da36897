"""What detectors, their criteria and their users exchange: objects, detections, and the criterion between them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Objects(NamedTuple):
    """The objects of one picture: ground truth."""

    boxes: Tensor
    """float32 [N, 4]: x1 y1 x2 y2 in pixels of the network's input."""
    labels: Tensor
    """int64 [N]: class indices 0..K-1."""


class Detections(NamedTuple):
    """What a detector found in one picture, best first."""

    boxes: Tensor
    """float32 [M, 4]: x1 y1 x2 y2 in pixels of the network's input; not clipped to the stored picture."""
    scores: Tensor
    """float32 [M], falling."""
    labels: Tensor
    """int64 [M]: class indices 0..K-1."""


class DetectionCriterion(Protocol):
    """Reads a detector's raw outputs: a loss against objects in training, detections in evaluation."""

    def loss(
        self, outputs: tuple[Tensor, ...], objects: Sequence[Objects], image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """`loss`, a scalar with gradient, and its detached parts, which add up to it; normalised, so it does not grow
        with the batch.

        Args:
            outputs: one raw tensor [B, C, h, w] per pyramid level, finest first.
            objects: ground truth of the B pictures.
            image_size: H, W of the network's input.

        Raises:
            ValueError: outputs, objects and image size do not fit together.
        """
        ...

    def detect(self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]) -> list[Detections]:
        """The detections of the B pictures. Arguments and errors as `loss`."""
        ...


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is: losses and boxes are never computed in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, max_candidates: int, max_detections: int
) -> Detections:
    """Non-maximum suppression within each class; the same result in the same order whenever scores tie.

    Args:
        boxes: [M, 4] x1 y1 x2 y2.
        scores: [M].
        labels: [M].
        iou: a box that overlaps a better one of its class by more than this is dropped.
        max_candidates: only so many of the best go in.
        max_detections: only so many of the best come out.
    """
    from torchvision.ops import batched_nms  # seconds to import

    # torchvision's order of equal scores depends on how many boxes there are. Sorted input makes position the order.
    order = scores.sort(descending=True, stable=True).indices[:max_candidates]
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    # It keeps classes apart by shifting each by the largest coordinate, which negative ones would defeat.
    shifted = boxes - boxes.amin() if len(boxes) else boxes
    keep = batched_nms(shifted, scores, labels, iou).sort().values[:max_detections]
    return Detections(boxes[keep].float(), scores[keep].float(), labels[keep])


def check_outputs(
    outputs: Sequence[Tensor], channels: int, strides: Sequence[int], image_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Rows and columns of each level.

    Raises:
        ValueError: number of levels, channels, batch or grid do not fit the strides and the image size.
    """
    if len(outputs) != len(strides):
        raise ValueError(f"got {len(outputs)} levels of outputs for strides {tuple(strides)}; give one for each")
    for level, (output, stride) in enumerate(zip(outputs, strides, strict=True)):
        grid = tuple(-(-side // stride) for side in image_size)
        expected = (len(outputs[0]), channels, *grid)
        if tuple(output.shape) != expected:
            raise ValueError(
                f"level {level} of the outputs has shape {tuple(output.shape)}; pictures of {image_size[0]}x"
                f"{image_size[1]} at stride {stride} give {expected}"
            )
    return [(output.shape[2], output.shape[3]) for output in outputs]


def check_objects(objects: Sequence[Objects], batch: int, num_classes: int) -> None:
    """Refuse ground truth that would silently train something else.

    Raises:
        ValueError: not one entry per picture, boxes not [N, 4], or as many labels as boxes, or a label out of range.
    """
    if len(objects) != batch:
        raise ValueError(f"got objects of {len(objects)} pictures for a batch of {batch}")
    for index, (boxes, labels) in enumerate(objects):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"picture {index} has boxes of shape {tuple(boxes.shape)} and labels of shape {tuple(labels.shape)}; "
                "give [N, 4] and [N]"
            )
    labels = torch.cat([entry.labels for entry in objects])
    if labels.numel():
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels run from {low} to {high}; the detector knows 0 to {num_classes - 1}")
