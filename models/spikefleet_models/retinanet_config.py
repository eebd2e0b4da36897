"""The configurations of Spiking RetinaNet and of its criterion, and the published members.

The network is in retinanet.py, the criterion in retinanet_loss.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spikefleet_models.family import ModelConfig
from spikefleet_models.sg_resnet_config import SGResNetConfig

if TYPE_CHECKING:
    from torch import nn

    from spikefleet_models.detection import DetectionCriterion


class RetinaCriterionConfig(BaseModel):
    """Anchors, assignment, loss and decoding of RetinaNet; the defaults are mmdetection's on COCO."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor_scale: float = Field(4.0, gt=0.0, description="Side of a level's smallest square anchor over its stride.")
    scales_per_octave: int = Field(3, ge=1, description="Number of anchor sizes per level.")
    aspect_ratios: tuple[float, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="Heights over widths.")
    positive_iou: float = Field(0.5, gt=0.0, le=1.0, description="An anchor with at least this IoU is matched.")
    negative_iou: float = Field(0.4, ge=0.0, le=1.0, description="Below: background; in between: ignored.")
    low_quality_matches: bool = Field(True, description="Match each object's best anchors at any IoU.")
    focal_alpha: float = Field(0.25, ge=0.0, le=1.0, description="Weight of the positive class in the focal loss.")
    focal_gamma: float = Field(2.0, ge=0.0, description="Focusing exponent of the focal loss.")
    box_loss: Literal["l1", "smooth_l1"] = Field("l1", description="Loss of the encoded boxes.")
    smooth_l1_beta: float = Field(1 / 9, gt=0.0, description="Error where smooth L1 turns from square to linear.")
    box_gain: float = Field(1.0, ge=0.0, description="Weight of the box loss.")
    score_threshold: float = Field(0.05, ge=0.0, lt=1.0, description="Detections have a score above this.")
    candidates_per_level: int = Field(1000, ge=1, description="Best boxes of each level that enter the suppression.")
    nms_iou: float = Field(
        0.5, ge=0.0, le=1.0, description="Overlap at which a worse box of the same class is dropped."
    )
    max_detections: int = Field(100, ge=1, description="Maximum number of detections per image.")

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> "RetinaCriterionConfig":
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou={self.negative_iou} must not exceed positive_iou={self.positive_iou}")
        if min(self.aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios={self.aspect_ratios}: every ratio must be above 0")
        return self

    @property
    def anchors_per_cell(self) -> int:
        """A: anchor sizes times aspect ratios."""
        return self.scales_per_octave * len(self.aspect_ratios)


_SG_RESNET = SGResNetConfig.presets


class RetinaNetConfig(ModelConfig):
    """A Spiking RetinaNet; the defaults are SG ResNet18 with three ASDs for COCO."""

    task: ClassVar[str] = "detection"
    trunk: ClassVar[tuple[str, ...]] = ("backbone.",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Zhang et al. 2023, detection; the last two are ANN twins.
        "retinanet_sg_resnet18": {"backbone": {"stem": "imagenet", **_SG_RESNET["sg_resnet18"]}},
        "retinanet_sg_resnet34": {"backbone": {"stem": "imagenet", **_SG_RESNET["sg_resnet34"]}},
        "retinanet_resnet18": {"backbone": {"stem": "imagenet", **_SG_RESNET["resnet18"]}},
        "retinanet_resnet34": {"backbone": {"stem": "imagenet", **_SG_RESNET["resnet34"]}},
        # For images of 64 to 160 pixels with small objects, strides 4, 8, 16.
        "retinanet_tiny": {
            "backbone": {"stages": (1, 1, 1), "width": 0.25, "stem": "imagenet"},
            "extra_levels": 0,
            "fpn_channels": 32,
        },
    }

    family: Literal["retinanet"] = "retinanet"
    backbone: SGResNetConfig = Field(
        default_factory=lambda: SGResNetConfig(stem="imagenet"),
        description="Residual network and decoders, without classifier: its num_classes is not used.",
    )
    num_classes: int = Field(80, ge=1, description="Classes of objects.")
    taps: int = Field(3, ge=1, description="Number of last stages that feed the pyramid; 3 is C3 to C5.")
    extra_levels: Literal[0, 2] = Field(2, description="Coarser levels after the last tapped stage; 2 is P6 and P7.")
    fpn_channels: int = Field(256, ge=1, description="Channels of pyramid and heads.")
    norm: Literal["none", "group"] = Field(
        "none", description="Normalisation in pyramid and heads; group norm does not depend on the images per worker."
    )
    norm_groups: int = Field(32, ge=1, description="Groups of the group norm; it must divide fpn_channels.")
    criterion: RetinaCriterionConfig = Field(
        default_factory=RetinaCriterionConfig, description="Anchors, loss and decoding."
    )

    @model_validator(mode="after")
    def _fits_backbone(self) -> "RetinaNetConfig":
        backbone = self.backbone
        if backbone.num_classes != SGResNetConfig.model_fields["num_classes"].default:
            raise ValueError(
                f"backbone.num_classes={backbone.num_classes} is not used by a detector; set num_classes instead"
            )
        if self.taps > len(backbone.stages):
            raise ValueError(
                f"taps={self.taps}, but the backbone has {len(backbone.stages)} stages; set taps to at most that many"
            )
        if self.norm == "group" and self.fpn_channels % self.norm_groups:
            raise ValueError(
                f"norm_groups={self.norm_groups} must divide fpn_channels={self.fpn_channels} for norm=group; "
                "set a divisor"
            )
        if backbone.uses_asd:
            for channels in self.tapped_channels:
                if channels % backbone.asd_channel_reduction:
                    raise ValueError(
                        f"backbone.asd_channel_reduction={backbone.asd_channel_reduction} must divide the {channels} "
                        "channels of every tapped stage; set a divisor"
                    )
        return self

    @property
    def timesteps(self) -> int:
        """T of the backbone as configured."""
        return self.backbone.timesteps

    @property
    def in_channels(self) -> int:
        """Channels of the images or event frames."""
        return self.backbone.in_channels

    @property
    def tapped_channels(self) -> tuple[int, ...]:
        """Channels of the stages that feed the pyramid."""
        return self.backbone.stage_channels[-self.taps :]

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level, finest first."""
        stages = len(self.backbone.stages)
        return tuple(
            self.backbone.stem_stride * 2**level for level in range(stages - self.taps, stages + self.extra_levels)
        )

    @property
    def is_spiking(self) -> bool:
        """Whether the backbone is spiking; pyramid and heads never are."""
        return self.backbone.is_spiking

    @property
    def needs_all_timesteps(self) -> bool:
        """True with weights over T in the decoder."""
        return self.backbone.uses_asd

    @property
    def stage_count(self) -> int:
        """Number of stages of the backbone."""
        return len(self.backbone.stages)

    def build(self) -> "nn.Module":
        """Build the `RetinaNet`."""
        from spikefleet_models.retinanet import RetinaNet

        return RetinaNet(self)

    def build_criterion(self) -> "DetectionCriterion":
        """Build the `RetinaCriterion`."""
        from spikefleet_models.retinanet_loss import RetinaCriterion

        return RetinaCriterion(self.criterion, self.num_classes, self.strides)

    def twin(self) -> Self:
        """The same configuration with the backbone's ANN twin."""
        return self.model_validate({**self.model_dump(), "backbone": self.backbone.twin().model_dump()})

    def tags(self) -> dict[str, object]:
        """Tags of the backbone and of the detector."""
        return {**self.backbone.tags(), **super().tags()}
