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
    boxes: Tensor, scores: Tensor, objects: Sequence[Objects], anchors: AnchorPoints, config: YoloCriterionConfig
) -> Assignment:
    """Assign anchor points to objects by task alignment, for the whole batch at once.

    Args:
        boxes: [B, A, 4] predicted boxes, x1 y1 x2 y2 in pixels.
        scores: [B, A, K] predicted scores in [0, 1].
        objects: ground truth of the B images; boxes without area get no anchor point.
        anchors: the A anchor points.
        config: topk, alpha, beta, match_small.
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

    b, n, a = candidate.nonzero(as_tuple=True)
    overlap = (1 - _complete_iou_loss(boxes[b, a], object_boxes[b, n])).clamp_min(0)
    iou = boxes.new_zeros(candidate.shape).index_put_((b, n, a), overlap)
    aligned = scores[b, a, labels[b, n]].pow(config.alpha) * overlap.pow(config.beta)
    # Below every candidate, whose alignment may well be 0.
    alignment = boxes.new_full(candidate.shape, -1.0).index_put_((b, n, a), aligned)

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
        bins: logits [P, 4, 16].
        distances: targets [P, 4] in cells; clamped to the range of the bins.

    Returns:
        Losses [P].
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
        check_objects(objects, len(outputs[0]), self.num_classes)
        with torch.autocast(outputs[0].device.type, enabled=False):
            bins, logits, boxes, anchors = self._read(outputs, image_size)
            target = assign(boxes, logits.sigmoid(), objects, anchors, config)
            foreground = target.owner >= 0
            weights = target.scores.sum(-1)
            divisor = weights.sum()
            total = divisor.clamp_min(1) if divided else torch.ones_like(divisor)
            weights = weights[foreground] / total
            distances = boxes_to_distances(target.boxes, anchors)[foreground]
            cls = F.binary_cross_entropy_with_logits(logits, target.scores, reduction="sum") / total
            box = (weights * _complete_iou_loss(boxes[foreground], target.boxes[foreground])).sum()
            dfl = (weights * distribution_focal_loss(bins[foreground], distances)).sum()
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
