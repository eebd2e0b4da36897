"""Loss of the anchor-free YOLO head: task-aligned assignment, CIoU, distribution focal loss, binary cross-entropy.

    assignment  t = s^alpha * u^beta                        Feng et al., "TOOD", ICCV 2021, eq 4; alpha .5, beta 6
    box         1 - CIoU                                    Zheng et al., AAAI 2020; torchvision's
    dfl         -(1 - f) log p_i - f log p_(i+1), d = i + f   Li et al., NeurIPS 2020, eq 6; mean over the four sides
    cls         BCE of every anchor and class against the normalised alignment

s is the anchor's score for the object's class, u the CIoU of its box with the object's, not below 0. An object's
candidates are the anchor points inside its box; it takes the `topk` of largest t. A point taken by several objects
goes to the one of highest u. The target score is t / max t * max u, maxima over the object's own anchors. All three
losses are divided by the sum of the target scores, or by 1 where that is less; box and dfl are weighted by them. An
object smaller than a cell may contain no point and is then never learned; `match_small` gives it the nearest point of
the finest level with target score 1, whatever the alignment: early in training the CIoU with so small a box is 0 or
less, and stays there. The predicted box always contains its point, so it will be a little larger than the object.

The paper trains with YOLOv8's loss and says no more; this follows the cited papers.
Deviations from YOLOv8's rules: a shared point goes to the best of the objects that took it, not of all that contain it;
t / max t has no additive epsilon, so the small alignments of early training are not wiped out; the loss is not
multiplied by the batch size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spikefleet_models.detection import Detections, Objects, check_objects, check_outputs, suppress
from spikefleet_models.spike_yolo.config import REG_MAX, YoloCriterionConfig
from spikefleet_models.spike_yolo.decode import (
    AnchorPoints,
    anchor_points,
    boxes_to_distances,
    distances_to_boxes,
    expected_distances,
    split_outputs,
)


class Assignment(NamedTuple):
    """Targets of the anchor points."""

    owner: Tensor
    """int64 [B, A]: index of the object in its image; -1 for background."""
    boxes: Tensor
    """[B, A, 4]: the owner's box; undefined for background."""
    scores: Tensor
    """[B, A, K]: target scores; 0 except for the owner's class."""


@torch.no_grad()
def assign(
    boxes: Tensor,
    scores: Tensor,
    objects: Sequence[Objects],
    anchors: AnchorPoints,
    config: YoloCriterionConfig,
    dense: bool = False,
) -> Assignment:
    """Assign anchor points to objects by task alignment, for the whole batch at once.

    Args:
        boxes: [B, A, 4] predicted boxes, x1 y1 x2 y2 in pixels.
        scores: [B, A, K] predicted scores in [0, 1].
        objects: ground truth of the B images; boxes without area get no anchor point.
        anchors: the A anchor points.
        config: topk, alpha, beta, match_small.
        dense: compute on all pairs and select afterwards, so that no shape depends on values that a host would have to
            wait for; the same numbers.
    """
    device = boxes.device
    # One entry more than there are images, so that N is at least 1 where no image has an object.
    padding = Objects(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    padded = [Objects(entry.boxes.to(device, boxes.dtype), entry.labels.to(device)) for entry in (*objects, padding)]
    object_boxes = pad_sequence([entry.boxes for entry in padded], batch_first=True)[:-1]  # [B, N, 4]
    labels = pad_sequence([entry.labels for entry in padded], batch_first=True)[:-1]  # [B, N]
    top_left, bottom_right = object_boxes.unsqueeze(2).chunk(2, dim=-1)
    candidate = ((anchors.points > top_left) & (anchors.points < bottom_right)).all(-1)  # [B, N, A]
    uncovered = torch.zeros_like(candidate[..., :1])  # [B, N, 1]
    if config.match_small:
        uncovered = (top_left < bottom_right).all(-1) & ~candidate.any(-1, keepdim=True)
        centres = (object_boxes[..., :2] + object_boxes[..., 2:]) / 2
        distance = torch.cdist(centres, anchors.points.expand(len(boxes), -1, -1))
        # In pixels, a coarse cell may well be nearer, but cannot express so small a box.
        coarse = (anchors.strides > anchors.strides.amin()).squeeze(1)
        nearest = distance.masked_fill_(coarse, torch.inf).argmin(-1, keepdim=True)
        candidate |= torch.zeros_like(candidate).scatter_(2, nearest, uncovered)

    # Below every candidate, whose alignment may well be 0.
    lowest = -1.0
    if dense:
        overlap = (1 - dense_complete_iou_loss(boxes.unsqueeze(1), object_boxes.unsqueeze(2))).clamp_min(0)
        iou = torch.where(candidate, overlap, 0.0)
        of_class = scores.gather(2, labels.unsqueeze(1).expand(-1, scores.shape[1], -1)).transpose(1, 2)
        alignment = torch.where(candidate, of_class.pow(config.alpha) * iou.pow(config.beta), lowest)
    else:
        b, n, a = candidate.nonzero(as_tuple=True)
        overlap = (1 - _complete_iou_loss(boxes[b, a], object_boxes[b, n])).clamp_min(0)
        iou = boxes.new_zeros(candidate.shape).index_put_((b, n, a), overlap)
        aligned = scores[b, a, labels[b, n]].pow(config.alpha) * overlap.pow(config.beta)
        alignment = boxes.new_full(candidate.shape, lowest).index_put_((b, n, a), aligned)

    best = alignment.topk(min(config.topk, alignment.shape[2]), dim=2)
    taken = torch.zeros_like(candidate).scatter_(2, best.indices, best.values >= 0)
    owner = torch.where(taken, iou, -1.0).argmax(1)  # [B, A]
    foreground = taken.any(1)
    taken &= torch.arange(taken.shape[1], device=device)[:, None] == owner[:, None]

    alignment = torch.where(taken, alignment, 0.0)
    peak = alignment.amax(2, keepdim=True).clamp_min(torch.finfo(alignment.dtype).tiny)
    peak_iou = torch.where(taken, iou, 0.0).amax(2, keepdim=True)
    target = torch.where(taken & uncovered, 1.0, alignment / peak * peak_iou).amax(1)  # [B, A]
    return Assignment(
        torch.where(foreground, owner, -1),
        object_boxes.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4)),
        torch.zeros_like(scores).scatter_(2, labels.gather(1, owner).unsqueeze(-1), target.unsqueeze(-1)),
    )


def distribution_focal_loss(bins: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (Li et al., NeurIPS 2020, eq 6), mean over the four sides.

    Args:
        bins: logits [..., 4, 16].
        distances: targets [..., 4] in cells; clamped to the range of the bins.

    Returns:
        Losses [...].
    """
    distances = distances.clamp(0, REG_MAX - 1 - 0.01)
    left = distances.floor()
    log_p = bins.log_softmax(-1)
    at_left, at_right = (log_p.gather(-1, side.long().unsqueeze(-1)).squeeze(-1) for side in (left, left + 1))
    return -torch.lerp(at_left, at_right, distances - left).mean(-1)


class YoloCriterion:
    """Loss and detections of the anchor-free YOLO head; a `DetectionCriterion`.

    Args:
        config: gains, assignment and decoding.
        num_classes: K.
        strides: pixels per cell of each level.
    """

    def __init__(self, config: YoloCriterionConfig, num_classes: int, strides: Sequence[int]) -> None:
        self.config = config
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.dense: bool | None = None
        """Whether the loss is computed on all anchor points, as `assign` says; None: on GPUs."""

    def loss(
        self,
        outputs: tuple[Tensor, ...],
        objects: Sequence[Objects],
        image_size: tuple[int, int],
        *,
        divided: bool = True,
    ) -> dict[str, Tensor]:
        """Compute `loss` with gradient and its detached parts `box`, `cls` and `dfl`; see `DetectionCriterion`.

        The parts include their gains.

        Raises:
            ValueError: outputs, objects and image size do not fit together.
        """
        config = self.config
        dense = outputs[0].is_cuda if self.dense is None else self.dense
        # A GPU's labels are not read: stores hold no other classes than they name.
        check_objects(objects, len(outputs[0]), self.num_classes, read=not dense)
        with torch.autocast(outputs[0].device.type, enabled=False):
            bins, logits, boxes, anchors = self._read(outputs, image_size)
            target = assign(boxes, logits.sigmoid(), objects, anchors, config, dense)
            foreground = target.owner >= 0
            weights = target.scores.sum(-1)
            divisor = weights.sum()
            total = divisor.clamp_min(1) if divided else torch.ones_like(divisor)
            distances = boxes_to_distances(target.boxes, anchors)
            cls = F.binary_cross_entropy_with_logits(logits, target.scores, reduction="sum") / total
            if dense:
                weights = torch.where(foreground, weights, 0.0) / total
                # A box without area has no angle: its gradient would be NaN, even times 0.
                unit, inside = torch.cat((boxes.new_zeros(2), boxes.new_ones(2))), foreground.unsqueeze(-1)
                overlap = dense_complete_iou_loss(
                    torch.where(inside, boxes, unit), torch.where(inside, target.boxes, unit)
                )
            else:
                weights = weights[foreground] / total
                overlap = _complete_iou_loss(boxes[foreground], target.boxes[foreground])
                bins, distances = bins[foreground], distances[foreground]
            box = (weights * overlap).sum()
            dfl = (weights * distribution_focal_loss(bins, distances)).sum()
            parts = {"box": config.box_gain * box, "cls": config.cls_gain * cls, "dfl": config.dfl_gain * dfl}
            loss = parts["box"] + parts["cls"] + parts["dfl"]
        undivided = {} if divided else {"divisor": divisor}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, **undivided}

    @torch.no_grad()
    def detect(self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]) -> list[Detections]:
        """Decode the detections of each image, best first; see `DetectionCriterion`.

        Raises:
            ValueError: outputs and image size do not fit together.
        """
        config = self.config
        with torch.autocast(outputs[0].device.type, enabled=False):
            _, logits, boxes, _ = self._read(outputs, image_size)
            detections = []
            for image_boxes, scores in zip(boxes, logits.sigmoid(), strict=True):
                keep = scores > config.score_threshold
                if not config.multi_label:
                    keep &= torch.zeros_like(keep).scatter_(1, scores.argmax(1, keepdim=True), True)
                anchor, label = keep.nonzero(as_tuple=True)
                detections.append(
                    suppress(
                        image_boxes[anchor],
                        scores[anchor, label],
                        label,
                        iou=config.nms_iou,
                        max_candidates=config.max_candidates,
                        max_detections=config.max_detections,
                    )
                )
        return detections

    def _read(
        self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, AnchorPoints]:
        """Bins [B, A, 4, 16], class logits [B, A, K], boxes [B, A, 4] in pixels, anchor points."""
        grids = check_outputs(outputs, 4 * REG_MAX + self.num_classes, self.strides, image_size)
        bins, logits = split_outputs(outputs, self.num_classes)
        anchors = anchor_points(grids, self.strides, logits)
        return bins, logits, distances_to_boxes(expected_distances(bins), anchors), anchors


def _complete_iou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - CIoU of each of [M, 4] boxes x1 y1 x2 y2 with its counterpart, [M]."""
    from torchvision.ops import complete_box_iou_loss  # seconds to import

    loss: Tensor = complete_box_iou_loss(boxes, others)
    return loss


def dense_complete_iou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - CIoU (Zheng et al., AAAI 2020) of boxes x1 y1 x2 y2 [..., 4] that are broadcast against others.

    torchvision's selects what overlaps, and a host waits for how many these are.
    """
    epsilon = 1e-7
    left, top, right, bottom = boxes.unbind(-1)
    other_left, other_top, other_right, other_bottom = others.unbind(-1)
    width, height = right - left, bottom - top
    other_width, other_height = other_right - other_left, other_bottom - other_top
    across = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_min(0)
    down = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_min(0)
    shared = across * down
    iou = shared / (width * height + other_width * other_height - shared + epsilon)
    hull_width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    hull_height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    diagonal = hull_width.square() + hull_height.square() + epsilon
    centres = ((left + right - other_left - other_right) / 2).square()
    centres = centres + ((top + bottom - other_top - other_bottom) / 2).square()
    angle = torch.atan(other_width / other_height) - torch.atan(width / height)
    aspect = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        balance = aspect / (1 - iou + aspect + epsilon)
    return 1 - iou + centres / diagonal + balance * aspect
