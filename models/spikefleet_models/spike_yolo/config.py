"""The configurations of SpikeYOLO, its published variants and Spiking YOLOv8, and the published members.

The networks are in network.py and spiking_yolov8.py, their criterion in loss.py.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spikefleet_models.family import ModelConfig
from spikefleet_models.neuron_config import NeuronConfig

if TYPE_CHECKING:
    from torch import nn

    from spikefleet_models.detection import DetectionCriterion

REG_MAX = 16
"""Bins of the distribution of a side's distance: 0, 1, ..., 15 cells."""

ATTENTION_HEADS = 8
"""Heads of the transformer variant's attention."""

ANCHORS = 3
"""Anchors per cell of the anchor head."""


class YoloCriterionConfig(BaseModel):
    """Loss, assignment and decoding of the anchor-free YOLO head; the defaults are SpikeYOLO's on COCO."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    box_gain: float = Field(7.5, ge=0.0, description="Weight of the CIoU loss.")
    cls_gain: float = Field(0.5, ge=0.0, description="Weight of the classification loss.")
    dfl_gain: float = Field(1.5, ge=0.0, description="Weight of the distribution focal loss.")
    topk: int = Field(10, ge=1, description="Maximum number of anchors per object.")
    alpha: float = Field(0.5, ge=0.0, description="Exponent of the score in the alignment score^alpha * IoU^beta.")
    beta: float = Field(6.0, ge=0.0, description="Exponent of the IoU in the alignment.")
    match_small: bool = Field(
        False, description="Match an object that contains no anchor point with the nearest one of the finest level."
    )
    score_threshold: float = Field(0.001, ge=0.0, lt=1.0, description="Detections have a score above this.")
    nms_iou: float = Field(
        0.7, ge=0.0, le=1.0, description="Overlap at which a worse box of the same class is dropped."
    )
    max_candidates: int = Field(30_000, ge=1, description="Best boxes of an image that enter the suppression.")
    max_detections: int = Field(300, ge=1, description="Maximum number of detections per image.")
    multi_label: bool = Field(True, description="A box may be detected as several classes, not only as its best.")


class _YoloConfig(ModelConfig):
    """Fields shared by the two families."""

    task: ClassVar[str] = "detection"
    trunk: ClassVar[tuple[str, ...]] = ("stem.", "stages.", "downs.")

    activation: Literal["spiking", "relu"] = Field(
        "spiking", description="relu replaces every neuron by a ReLU: the ANN twin."
    )
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="ilif"), description="Every spiking neuron of the network."
    )
    timesteps: int = Field(1, ge=1, description="Time steps T; the ANN twin always runs one.")
    in_channels: int = Field(3, ge=1, description="Channels of the images or event frames.")
    num_classes: int = Field(80, ge=1, description="Classes of objects, K.")
    box_channels: int = Field(64, ge=4, description="Minimum number of hidden channels of the head's box branch.")
    criterion: YoloCriterionConfig = Field(
        default_factory=YoloCriterionConfig, description="Loss, assignment of objects, decoding."
    )

    @property
    def is_spiking(self) -> bool:
        """False for the ANN twin."""
        return self.activation != "relu"

    @property
    @abstractmethod
    def strides(self) -> tuple[int, int, int]:
        """Pixels per cell of each level, finest first."""

    @property
    def input_multiple(self) -> int:
        """The coarsest stride."""
        return self.strides[-1]

    @property
    def stage_count(self) -> int:
        """The backbone has four stages."""
        return 4

    def build_criterion(self) -> "DetectionCriterion":
        """Build the `YoloCriterion`."""
        from spikefleet_models.spike_yolo.loss import YoloCriterion

        return YoloCriterion(self.criterion, self.num_classes, self.strides)

    def twin(self) -> Self:
        """The same configuration with `activation: relu`."""
        return self.model_validate({**self.model_dump(), "activation": "relu"})

    def tags(self) -> dict[str, object]:
        """Tags of the base class, activation and neuron."""
        return {**super().tags(), "activation": self.activation, **self.neuron.tags()}


_N: Mapping[str, Any] = {"depth": 0.33, "width": 0.375}
_S: Mapping[str, Any] = {"depth": 0.33, "width": 0.5}
_M: Mapping[str, Any] = {"depth": 0.5, "width": 0.625, "neck_ratio": 2}
_L: Mapping[str, Any] = {"depth": 0.5, "width": 0.75, "neck_ratio": 2}
_TINY: Mapping[str, Any] = {"depth": 0.1, "width": 0.0625, "stem_stride": 2, "box_channels": 16}


class SpikeYoloConfig(_YoloConfig):
    """SpikeYOLO; the defaults are the 23.1M member on COCO."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Luo et al. 2024, table 1; T = 1, D = 4.
        "spike_yolo_n": _N,
        "spike_yolo_s": _S,
        "spike_yolo_m": _M,
        "spike_yolo_l": _L,
        # For images of 64 to 160 pixels with small objects, strides 4, 8, 16: a step of 8 takes a quarter of a second.
        "spike_yolo_tiny": _TINY,
        # Table 2: the same as an ANN.
        "spike_yolo_ann_s": {**_S, "activation": "relu"},
        "spike_yolo_ann_tiny": {**_TINY, "activation": "relu"},
        # Table 5.
        "spike_yolo_s_no_rep": {**_S, "reparameterise": False},
        "spike_yolo_s_block2": {**_S, "low_block": "block2"},
        "spike_yolo_s_transformer": {**_S, "high_block": "transformer"},
        "spike_yolo_s_anchor": {**_S, "head": "anchor"},
    }

    family: Literal["spike_yolo"] = "spike_yolo"
    depth: float = Field(0.33, gt=0.0, description="Factor on the blocks of the four stages, 3, 6, 9 and 3.")
    width: float = Field(0.5, gt=0.0, description="Factor on the channels of the four stages, 128 to 1024.")
    neck_ratio: int = Field(1, ge=1, description="Expansion of the last neck block: 1 for n and s, 2 for m and l.")
    stem_stride: Literal[2, 4] = Field(
        4, description="Stride of the first convolution; levels have 2, 4 and 8 times it."
    )
    reparameterise: bool = Field(
        True, description="Chains of convolutions that can be merged; false puts neurons between the convolutions."
    )
    low_block: Literal["block1", "block2"] = Field("block1", description="Blocks at strides 4 and 8.")
    high_block: Literal["block2", "transformer"] = Field("block2", description="Blocks at strides 16 and 32.")
    head: Literal["anchor_free", "anchor"] = Field(
        "anchor_free", description="Decoupled head with box bins, or anchors."
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SpikeYoloConfig":
        if self.stage_channels[0] < 2:
            raise ValueError(
                f"width={self.width} gives {self.stage_channels[0]} channels at stride 4; set a width that gives at "
                "least 2"
            )
        attended = (self.stage_channels[2], self.stage_channels[3], *self.pyramid_channels[1:])
        if self.high_block == "transformer" and any(channels % ATTENTION_HEADS for channels in attended):
            raise ValueError(
                f"width={self.width} gives the transformer blocks {', '.join(map(str, attended))} channels; set a "
                f"width that gives multiples of their {ATTENTION_HEADS} heads"
            )
        return self

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Channels of the backbone's four stages."""
        return (int(128 * self.width), int(256 * self.width), int(512 * self.width), int(1024 * self.width))

    @property
    def pyramid_channels(self) -> tuple[int, int, int]:
        """Channels of the three levels that the head sees, finest first."""
        fine, coarse = self.stage_channels[1], self.stage_channels[2]
        return (fine, 2 * fine, 2 * coarse)

    @property
    def stage_repeats(self) -> tuple[int, int, int, int]:
        """Blocks of the backbone's four stages; halves round to even, as published: 4.5 is 4."""
        return tuple(max(round(blocks * self.depth), 1) for blocks in (3, 6, 9, 3))  # type: ignore[return-value]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per cell of each level, finest first."""
        return (2 * self.stem_stride, 4 * self.stem_stride, 8 * self.stem_stride)

    def build(self) -> "nn.Module":
        """Build the `SpikeYolo`."""
        from spikefleet_models.spike_yolo.network import SpikeYolo

        return SpikeYolo(self)

    def build_criterion(self) -> "DetectionCriterion":
        """Build the `YoloCriterion`.

        Raises:
            ValueError: `head` is "anchor", whose loss was not published.
        """
        if self.head == "anchor":
            raise ValueError("head='anchor' has no published loss and cannot be trained; set head='anchor_free'")
        return super().build_criterion()


class SpikingYoloV8Config(_YoloConfig):
    """YOLOv8 with a neuron before each convolution; the defaults are the m member."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"spiking_yolov8_m": {}}  # Luo et al. 2024, table 2

    family: Literal["spiking_yolov8"] = "spiking_yolov8"
    depth: float = Field(0.67, gt=0.0, description="Factor on the bottlenecks of a block, 3 and 6.")
    width: float = Field(0.75, gt=0.0, description="Factor on the channels, 64 to 1024.")
    max_channels: int = Field(768, ge=64, description="Maximum number of channels before the factor.")

    def channels(self, published: int) -> int:
        """Cap and scale a published number of channels, rounded up to a multiple of 8."""
        return math.ceil(min(published, self.max_channels) * self.width / 8) * 8

    def repeats(self, published: int) -> int:
        """Scale a published number of bottlenecks."""
        return max(round(published * self.depth), 1)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per cell of each level, finest first."""
        return (8, 16, 32)

    def build(self) -> "nn.Module":
        """Build the `SpikingYoloV8`."""
        from spikefleet_models.spike_yolo.spiking_yolov8 import SpikingYoloV8

        return SpikingYoloV8(self)
