"""Types that detectors, criteria and their callers exchange: objects, detections, and the criterion protocol."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Objects(NamedTuple):
    """Ground truth of one image."""

    boxes: Tensor
    """float32 [N, 4]: x1 y1 x2 y2 in pixels of the network's input."""
    labels: Tensor
    """int64 [N]: class indices 0..K-1."""


class Detections(NamedTuple):
    """Detections in one image, best first."""

    boxes: Tensor
    """float32 [M, 4]: x1 y1 x2 y2 in pixels of the network's input; not clipped to the stored image."""
    scores: Tensor
    """float32 [M], in descending order."""
    labels: Tensor
    """int64 [M]: class indices 0..K-1."""


class DetectionCriterion(Protocol):
    """Turns a detector's raw outputs into a loss in training and into detections in evaluation."""

    def loss(
        self,
        outputs: tuple[Tensor, ...],
        objects: Sequence[Objects],
        image_size: tuple[int, int],
        *,
        divided: bool = True,
    ) -> dict[str, Tensor]:
        """Compute the loss, normalised so that it does not grow with the batch.

        Args:
            outputs: one raw tensor [B, C, h, w] per pyramid level, finest first.
            objects: ground truth of the B images.
            image_size: H, W of the network's input.
            divided: false returns sums over the batch, before they are divided by `divisor`. Sums and divisors of the
                ranks' parts of a batch add up to those of the whole, so that its loss is their quotient.

        Returns:
            `loss`, a scalar with gradient, and its detached parts, which add up to it; with `divided=False` also
            `divisor`, a scalar without gradient, which counts as 1 where it is less.

        Raises:
            ValueError: outputs, objects and image size do not fit together.
        """
        ...

    def detect(self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]) -> list[Detections]:
        """Decode the detections of the B images.

        Args:
            outputs: one raw tensor [B, C, h, w] per pyramid level, finest first.
            image_size: H, W of the network's input.

        Raises:
            ValueError: outputs and image size do not fit together.
        """
        ...


def wide(x: Tensor) -> Tensor:
    """Cast x to fp32, or keep fp64: losses and boxes are never computed in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, max_candidates: int, max_detections: int
) -> Detections:
    """Non-maximum suppression within each class, with a deterministic order where scores tie.

    Args:
        boxes: [M, 4] x1 y1 x2 y2.
        scores: [M].
        labels: [M].
        iou: a box that overlaps a better one of its class by more than this is dropped.
        max_candidates: number of best boxes that enter the suppression.
        max_detections: number of best boxes that are returned.
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
    """Check a detector's raw outputs [B, C, h, w] and return (h, w) of each level.

    Raises:
        ValueError: number of levels, channels, batch or grid do not fit the strides and the image size.
    """
    if len(outputs) != len(strides):
        raise ValueError(
            f"outputs: expected one level for each stride of {tuple(strides)}, found {len(outputs)} levels"
        )
    for level, (output, stride) in enumerate(zip(outputs, strides, strict=True)):
        grid = tuple(-(-side // stride) for side in image_size)
        expected = (len(outputs[0]), channels, *grid)
        if tuple(output.shape) != expected:
            raise ValueError(
                f"outputs: level {level} has shape {tuple(output.shape)}, expected {expected} for images of "
                f"{image_size[0]}x{image_size[1]} at stride {stride}"
            )
    return [(output.shape[2], output.shape[3]) for output in outputs]


def check_objects(objects: Sequence[Objects], batch: int, num_classes: int, read: bool = True) -> None:
    """Check that the ground truth fits the batch and the classes.

    Args:
        objects: ground truth.
        batch: number of images.
        num_classes: K.
        read: check the values of the labels too, for which the host waits where they are on a GPU.

    Raises:
        ValueError: not one entry per image, boxes not [N, 4], labels not [N], or a label out of range.
    """
    if len(objects) != batch:
        raise ValueError(f"objects: expected one entry for each of {batch} images, found {len(objects)}")
    for index, (boxes, labels) in enumerate(objects):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"objects: image {index} has boxes of shape {tuple(boxes.shape)} and labels of shape "
                f"{tuple(labels.shape)}, expected [N, 4] and [N]"
            )
    labels = torch.cat([entry.labels for entry in objects])
    if read and labels.numel():
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"objects: labels range from {low} to {high}, expected 0 to {num_classes - 1}; correct the labels or "
                "set num_classes"
            )
