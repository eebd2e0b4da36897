"""Criterion of RetinaNet: anchors, assignment, focal and box loss, decoding; built from torchvision's parts.

Lin et al., "Focal loss for dense object detection", ICCV 2017, with mmdetection's settings: anchors of 4 strides times
2^(0, 1/3, 2/3) in three aspect ratios; IoU from .5 up is an object, below .4 background, and every object gets its best
anchors whatever their IoU; both losses are sums over the batch divided by the number of positive anchors of the batch.

Deviations from mmdetection, all torchvision's: half-sides of anchors are rounded to whole pixels; an anchor that is the
best of one object but overlaps another one more goes to the other; boxes are clipped to the network's input; anchors in
the padding of an image count as background. An object that no anchor overlaps (one without area) is left out: all
anchors would be its "best".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spikefleet_models.detection import Detections, Objects, check_objects, check_outputs, suppress, wide
from spikefleet_models.retinanet_config import RetinaCriterionConfig


class RetinaCriterion:
    """Loss and detections of RetinaNet; a `DetectionCriterion`.

    Args:
        config: anchors, assignment, loss and decoding.
        num_classes: K.
        strides: pixels per cell of each level.
    """

    def __init__(self, config: RetinaCriterionConfig, num_classes: int, strides: Sequence[int]) -> None:
        from torchvision.models.detection._utils import BoxCoder, Matcher  # seconds to import, as all of torchvision
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        self.config = config
        self.num_classes = num_classes
        self.strides = tuple(strides)
        octave = [2 ** (index / config.scales_per_octave) for index in range(config.scales_per_octave)]
        sizes = tuple(tuple(config.anchor_scale * stride * scale for scale in octave) for stride in self.strides)
        self._generator = AnchorGenerator(sizes, (config.aspect_ratios,) * len(self.strides))
        self._matcher = Matcher(config.positive_iou, config.negative_iou, config.low_quality_matches)
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.dense: bool | None = None
        """Whether the loss is computed on all anchors, so that no shape depends on values that a host would have to
        wait for; None: on GPUs. Assignment and `cls` have the same bits, `box` adds in another order."""

    def anchors(self, grids: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Generate the anchors of each level: [h * w * A, 4] x1 y1 x2 y2, of the type and on the device of `like`."""
        self._generator.set_cell_anchors(like.dtype, like.device)
        boxes: list[Tensor] = self._generator.grid_anchors(list(grids), [(stride, stride) for stride in self.strides])
        return boxes

    def loss(
        self,
        outputs: tuple[Tensor, ...],
        objects: Sequence[Objects],
        image_size: tuple[int, int],
        *,
        divided: bool = True,
    ) -> dict[str, Tensor]:
        """Compute `loss` with gradient and its detached parts `cls` and `box`, gain included; see `DetectionCriterion`.

        Raises:
            ValueError: outputs, objects and image size do not fit together.
        """
        from torchvision.models.detection._utils import encode_boxes
        from torchvision.ops import sigmoid_focal_loss

        config = self.config
        dense = outputs[0].is_cuda if self.dense is None else self.dense
        # A GPU's labels are not read: stores hold no other classes than they name.
        check_objects(objects, len(outputs[0]), self.num_classes, read=not dense)
        with torch.autocast(outputs[0].device.type, enabled=False):
            levels = self._read(outputs, image_size)
            logits, codes = (torch.cat([level[part] for level in levels], dim=1) for part in (0, 1))
            anchors = torch.cat([level[2] for level in levels])
            on_device = [Objects(entry.boxes.to(anchors), entry.labels.to(anchors.device)) for entry in objects]
            # One entry more than there are images, so that N is at least 1 where no image has an object.
            padding = Objects(anchors.new_zeros(1, 4), torch.zeros(1, dtype=torch.int64, device=anchors.device))
            padded = [*on_device, padding]
            boxes, labels = (pad_sequence([entry[part] for entry in padded], batch_first=True)[:-1] for part in (0, 1))
            owner = torch.stack([self._match(entry.boxes, anchors, dense) for entry in on_device])  # [B, M]
            foreground, owned = owner >= 0, owner.clamp_min(0)
            classes = labels.gather(1, owned).unsqueeze(-1)
            target = torch.zeros_like(logits).scatter_(2, classes, foreground.to(logits).unsqueeze(-1))
            boxes = boxes.gather(1, owned.unsqueeze(-1).expand(-1, -1, 4))
            count = foreground.sum()
            divisor = count.clamp_min(1) if divided else torch.ones_like(count)
            focal = sigmoid_focal_loss(logits, target, config.focal_alpha, config.focal_gamma)
            cls = (focal * (owner != self._matcher.BETWEEN_THRESHOLDS).unsqueeze(-1)).sum() / divisor
            inside = foreground.unsqueeze(-1)
            if dense:
                # Background is compared with itself: finite, and 0 in loss and gradient.
                boxes, anchors = torch.where(inside, boxes, anchors).flatten(0, 1), anchors.repeat(len(boxes), 1)
                target_codes = encode_boxes(boxes, anchors, anchors.new_ones(4)).view_as(codes)
                codes = torch.where(inside, codes, target_codes)
            else:
                b, m = foreground.nonzero(as_tuple=True)
                codes, target_codes = codes[b, m], self._coder.encode_single(boxes[b, m], anchors[m])
            beta = config.smooth_l1_beta if config.box_loss == "smooth_l1" else 0.0
            box = F.smooth_l1_loss(codes, target_codes, reduction="sum", beta=beta) / divisor
            parts = {"cls": cls, "box": config.box_gain * box}
        undivided = {} if divided else {"divisor": count.to(cls)}
        loss = parts["cls"] + parts["box"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, **undivided}

    @torch.no_grad()
    def detect(self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]) -> list[Detections]:
        """Decode the detections of each image, best first; see `DetectionCriterion`.

        Raises:
            ValueError: outputs and image size do not fit together.
        """
        with torch.autocast(outputs[0].device.type, enabled=False):
            levels = self._read(outputs, image_size)
            return [
                self._detect([(logits[index], codes[index], anchors) for logits, codes, anchors in levels], image_size)
                for index in range(len(outputs[0]))
            ]

    def _detect(self, levels: list[tuple[Tensor, Tensor, Tensor]], image_size: tuple[int, int]) -> Detections:
        """Detections of one image from logits [M, K], codes [M, 4] and anchors [M, 4] of each level."""
        from torchvision.ops import clip_boxes_to_image

        boxes, scores, labels = [], [], []
        for logits, codes, anchors in levels:
            level_scores = logits.sigmoid()
            anchor, label = (level_scores > self.config.score_threshold).nonzero(as_tuple=True)
            values = level_scores[anchor, label]
            best = values.sort(descending=True, stable=True).indices[: self.config.candidates_per_level]
            anchor, label = anchor[best], label[best]
            decoded = self._coder.decode_single(codes[anchor], anchors[anchor])
            boxes.append(clip_boxes_to_image(decoded, image_size))
            scores.append(values[best])
            labels.append(label)
        return suppress(
            torch.cat(boxes),
            torch.cat(scores),
            torch.cat(labels),
            iou=self.config.nms_iou,
            max_candidates=self.config.candidates_per_level * len(levels),
            max_detections=self.config.max_detections,
        )

    def _match(self, boxes: Tensor, anchors: Tensor, dense: bool = False) -> Tensor:
        """Index of each anchor's object, [M]; -1 for background, -2 for anchors to ignore."""
        from torchvision.ops import box_iou

        if dense:
            return match_densely(boxes, anchors, self.config)
        overlaps = box_iou(boxes, anchors)
        seen = overlaps.amax(1).nonzero().squeeze(1)
        if not len(seen):
            return torch.full((len(anchors),), self._matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        matches: Tensor = self._matcher(overlaps[seen])
        return torch.where(matches >= 0, seen[matches.clamp_min(0)], matches)

    def _read(self, outputs: tuple[Tensor, ...], image_size: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Class logits [B, M, K], box codes [B, M, 4] and anchors [M, 4] of each level; M = h * w * A."""
        per_cell, K = self.config.anchors_per_cell, self.num_classes
        grids = check_outputs(outputs, per_cell * (K + 4), self.strides, image_size)
        levels = []
        for output, anchors in zip(outputs, self.anchors(grids, wide(outputs[0])), strict=True):
            logits, codes = (
                part.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
                for part in wide(output).split((per_cell * K, per_cell * 4), dim=1)
            )
            levels.append((logits, codes, anchors))
        return levels


def match_densely(boxes: Tensor, anchors: Tensor, config: RetinaCriterionConfig) -> Tensor:
    """Index of each anchor's object, [M], as torchvision's `Matcher` has it, which a host waits for.

    Args:
        boxes: of the objects of an image, [N, 4]; those that no anchor overlaps are left out.
        anchors: [M, 4].
        config: bounds of the IoU.

    Returns:
        -1 for background, -2 for anchors to ignore.
    """
    from torchvision.ops import box_iou

    background = torch.full((len(anchors),), -1, device=anchors.device)
    if not len(boxes):
        return background
    overlaps = box_iou(boxes, anchors)
    best = overlaps.amax(1, keepdim=True)
    seen = best != 0
    values, indices = overlaps.max(0)
    matches = torch.where(values < config.negative_iou, -1, torch.where(values < config.positive_iou, -2, indices))
    if config.low_quality_matches:
        matches = torch.where(((overlaps == best) & seen).any(0), indices, matches)
    return torch.where(seen.any(), matches, background)
