"""Configurations of the detectors of this package: SpikeYOLO with its published variants, and Spiking YOLOv8."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spikefleet_models.neurons import NeuronConfig
from spikefleet_models.spike_yolo.loss import YoloCriterionConfig

REG_MAX = 16
"""Bins of the distribution of each side of a box."""

ATTENTION_HEADS = 8
"""Heads of the transformer variant's attention."""

ANCHORS = 3
"""Anchors a cell of the anchor head."""


class _YoloConfig(BaseModel):
    """What the two families share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation: Literal["spiking", "relu"] = Field(
        "spiking", description="relu puts a ReLU in the place of every neuron: the ANN twin."
    )
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="ilif"), description="Every spiking neuron of the network."
    )
    timesteps: int = Field(1, ge=1, description="T; the ANN twin runs one step whatever this says.")
    in_channels: int = Field(3, ge=1, description="Channels of the pictures or event frames.")
    num_classes: int = Field(80, ge=1, description="Classes of objects, K.")
    box_channels: int = Field(64, ge=4, description="Least channels of the hidden layers of the head's box branch.")
    criterion: YoloCriterionConfig = Field(
        default_factory=YoloCriterionConfig, description="Loss, assignment of objects, decoding."
    )

    @property
    def simulated_timesteps(self) -> int:
        """T that really runs: 1 for the ANN twin."""
        return 1 if self.activation == "relu" else self.timesteps


class SpikeYoloConfig(_YoloConfig):
    """SpikeYOLO; the defaults are the 23.1M member on COCO."""

    family: Literal["spike_yolo"] = "spike_yolo"
    depth: float = Field(0.33, gt=0.0, description="Factor on the blocks of the four stages, 3, 6, 9 and 3.")
    width: float = Field(0.5, gt=0.0, description="Factor on the channels of the four stages, 128 to 1024.")
    neck_ratio: int = Field(1, ge=1, description="Expansion of the last neck block: 1 for n and s, 2 for m and l.")
    stem_stride: Literal[2, 4] = Field(4, description="Stride of the first convolution; the levels' are 2, 4, 8 times.")
    reparameterise: bool = Field(
        True, description="Merge-able chains of convolutions; false puts neurons between their convolutions."
    )
    low_block: Literal["block1", "block2"] = Field("block1", description="Blocks at strides 4 and 8.")
    high_block: Literal["block2", "transformer"] = Field("block2", description="Blocks at strides 16 and 32.")
    head: Literal["anchor_free", "anchor"] = Field("anchor_free", description="Decoupled box bins, or anchors.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SpikeYoloConfig":
        if self.stage_channels[0] < 2:
            raise ValueError(f"width={self.width} gives {self.stage_channels[0]} channels at stride 4; give at least 2")
        attended = (self.stage_channels[2], self.stage_channels[3], *self.pyramid_channels[1:])
        if self.high_block == "transformer" and any(channels % ATTENTION_HEADS for channels in attended):
            raise ValueError(
                f"width={self.width} gives {', '.join(map(str, attended))} channels to the transformer blocks; they "
                f"have {ATTENTION_HEADS} heads, so choose a width that gives multiples of {ATTENTION_HEADS}"
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
        """Blocks of the backbone's four stages. Half rounds to even, as published: 4.5 is 4."""
        return tuple(max(round(blocks * self.depth), 1) for blocks in (3, 6, 9, 3))  # type: ignore[return-value]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels a cell of each level, finest first."""
        return (2 * self.stem_stride, 4 * self.stem_stride, 8 * self.stem_stride)


class SpikingYoloV8Config(_YoloConfig):
    """YOLOv8 with a neuron before each convolution; the defaults are the m member."""

    family: Literal["spiking_yolov8"] = "spiking_yolov8"
    depth: float = Field(0.67, gt=0.0, description="Factor on the bottlenecks of a block, 3 and 6.")
    width: float = Field(0.75, gt=0.0, description="Factor on the channels, 64 to 1024.")
    max_channels: int = Field(768, ge=64, description="Most channels before the factor.")

    def channels(self, published: int) -> int:
        """The next multiple of 8 from the published number, capped and scaled."""
        return math.ceil(min(published, self.max_channels) * self.width / 8) * 8

    def repeats(self, published: int) -> int:
        """Bottlenecks of a block."""
        return max(round(published * self.depth), 1)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels a cell of each level, finest first."""
        return (8, 16, 32)
