"""A small detector of event frames that trains in minutes on one core: four convolutions and one level of boxes.

Ours, for `carried_scenes.py`: the network of `small_event_net`, two layers more, and SpikeYOLO's boxes and criterion.

    conv5x5, stride 2; conv3x3, stride 2; conv3x3; conv3x3      BN and I-LIF after each; 24, 48, 48, 64 channels
    conv1x1                                                     mean over T; 16 bins a side and the classes, stride 4

With D = 1 and a leak near 1 a neuron whose current was strong goes on firing for some windows: its reset takes 1 of
the charge for each spike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from spikefleet_models.families import register_family
from spikefleet_models.family import ModelConfig
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.spike_yolo.config import REG_MAX, YoloCriterionConfig

if TYPE_CHECKING:
    from torch import nn

    from spikefleet_models.detection import DetectionCriterion

STRIDE = 4
"""Pixels per cell."""


@register_family
class SmallEventDetectorConfig(ModelConfig):
    """Four convolutions; H and W are halved by the first two."""

    task: ClassVar[str] = "detection"
    trunk: ClassVar[tuple[str, ...]] = ("layers.",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    family: Literal["small_event_detector"] = "small_event_detector"
    channels: tuple[int, ...] = Field((24, 48, 48, 64), min_length=2, description="Channels of the convolutions.")
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="ilif", bound=1, leak=0.95), description="Every spiking neuron."
    )
    timesteps: int = Field(1, ge=1, description="Time steps T of a window.")
    in_channels: int = Field(2, ge=1, description="Channels of the event frames.")
    num_classes: int = Field(10, ge=1, description="Classes of objects.")
    criterion: YoloCriterionConfig = Field(
        default_factory=YoloCriterionConfig, description="Loss, assignment of objects, decoding."
    )

    @property
    def input_multiple(self) -> int:
        """The stride."""
        return STRIDE

    def build(self) -> nn.Module:
        """Build the network."""
        return _network(self)

    def build_criterion(self) -> DetectionCriterion:
        """Build SpikeYOLO's criterion for one level."""
        from spikefleet_models.spike_yolo.loss import YoloCriterion

        return YoloCriterion(self.criterion, self.num_classes, (STRIDE,))


def _network(config: SmallEventDetectorConfig) -> nn.Module:
    import torch
    from torch import Tensor, nn

    from spikefleet_models.neurons import build_neuron
    from spikefleet_models.residual_block import ConvUnit
    from spikefleet_models.spiking_unit import SpikingUnit

    class SmallEventDetector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.timesteps = config.timesteps
            self.layers = nn.Sequential()
            previous = config.in_channels
            for index, channels in enumerate(config.channels):
                kernel, stride = 5 if index == 0 else 3, 2 if index < 2 else 1
                conv = nn.Conv2d(previous, channels, kernel, stride, kernel // 2, bias=False)
                unit = SpikingUnit(nn.BatchNorm2d(channels), build_neuron(config.neuron), config.timesteps)
                self.layers.append(ConvUnit(conv, unit))
                previous = channels
            self.head = nn.Conv2d(previous, 4 * REG_MAX + config.num_classes, 1)
            with torch.no_grad():
                bias = self.head.get_parameter("bias")
                bias[: 4 * REG_MAX] = 1.0
                bias[4 * REG_MAX :] = -math.log(100 * config.num_classes)

        def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
            """Compute the raw output [B, 4 * 16 + K, h, w] of the level, of frames [T, B, C, H, W]."""
            spikes = self.layers(frames)
            return (self.head(spikes.mean(0)),)

    return SmallEventDetector()
