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
        from torchvision.ops import sigmoid_focal_loss

        config = self.config
        check_objects(objects, len(outputs[0]), self.num_classes)
        with torch.autocast(outputs[0].device.type, enabled=False):
            levels = self._read(outputs, image_size)
            logits, codes = (torch.cat([level[part] for level in levels], dim=1) for part in (0, 1))
            anchors = torch.cat([level[2] for level in levels])
            on_device = [Objects(entry.boxes.to(anchors), entry.labels.to(anchors.device)) for entry in objects]
            boxes, labels = (pad_sequence([entry[part] for entry in on_device], batch_first=True) for part in (0, 1))
            owner = torch.stack([self._match(entry.boxes, anchors) for entry in on_device])  # [B, M]
            b, m = (owner >= 0).nonzero(as_tuple=True)
            positives = max(1, len(b)) if divided else 1
            target = torch.zeros_like(logits)
            target[b, m, labels[b, owner[b, m]]] = 1.0
            focal = sigmoid_focal_loss(logits, target, config.focal_alpha, config.focal_gamma)
            cls = (focal * (owner != self._matcher.BETWEEN_THRESHOLDS).unsqueeze(-1)).sum() / positives
            target_codes = self._coder.encode_single(boxes[b, owner[b, m]], anchors[m])
            beta = config.smooth_l1_beta if config.box_loss == "smooth_l1" else 0.0
            box = F.smooth_l1_loss(codes[b, m], target_codes, reduction="sum", beta=beta) / positives
            parts = {"cls": cls, "box": config.box_gain * box}
        undivided = {} if divided else {"divisor": cls.new_tensor(float(len(b)))}
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

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Index of each anchor's object, [M]; -1 for background, -2 for anchors to ignore."""
        from torchvision.ops import box_iou

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
