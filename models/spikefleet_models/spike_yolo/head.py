"""Detection heads: raw outputs of each pyramid level, averaged over T; decode.py interprets them."""

import math

import torch
from torch import Tensor, nn

from spikefleet_models.spike_yolo.blocks import Plan, prediction, spike_conv
from spikefleet_models.spike_yolo.config import ANCHORS, REG_MAX

PRIOR_IMAGE_SIDE = 640
"""The initial class bias expects 5 objects in an image of this side, whatever the training size is."""

BOX_BIAS = 1.0


class DecoupledHead(nn.Module):
    """SpikeDetect: per level a box branch and a class branch, each 3x3, 3x3, 1x1 with a neuron before each.

    Args:
        plan: settings of the network.
        in_channels: channels of the levels, finest first.
        strides: pixels per cell of the levels.
        num_classes: K.
        box_channels: minimum number of hidden channels of the box branch.
    """

    def __init__(
        self, plan: Plan, in_channels: tuple[int, ...], strides: tuple[int, ...], num_classes: int, box_channels: int
    ) -> None:
        super().__init__()
        self.steps = plan.steps
        self.box = nn.ModuleList()
        self.classes = nn.ModuleList()
        box_hidden = max(16, in_channels[0] // 4, box_channels)
        class_hidden = max(in_channels[0], min(num_classes, 100))
        for channels, stride in zip(in_channels, strides, strict=True):
            self.box.append(_branch(plan, channels, box_hidden, 4 * REG_MAX, BOX_BIAS))
            prior = math.log(5 / num_classes / (PRIOR_IMAGE_SIDE / stride) ** 2)
            self.classes.append(_branch(plan, channels, class_hidden, num_classes, prior))
        # Distance of each bin in cells: frozen weights of the published network, which its parameter count includes.
        self.bins = nn.Parameter(torch.arange(REG_MAX, dtype=torch.float32), requires_grad=False)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the raw outputs of the levels.

        Args:
            features: currents [T * B, C, h, w] of the levels, finest first.

        Returns:
            [B, 4 * 16 + K, h, w] per level: logits of the left, top, right, bottom bins, then of the classes.
        """
        outputs = []
        for x, box, classes in zip(features, self.box, self.classes, strict=True):
            outputs.append(_mean_over_time(torch.cat((box(x), classes(x)), dim=1), self.steps.count))
        return tuple(outputs)


class AnchorHead(nn.Module):
    """Table 5's anchor-based head: SN and one 1x1 convolution per level. Its loss was not published."""

    def __init__(self, plan: Plan, in_channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.steps = plan.steps
        self.levels = nn.ModuleList(prediction(plan, channels, ANCHORS * (num_classes + 5)) for channels in in_channels)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the raw outputs of the levels: currents [T * B, C, h, w] -> [B, 3 * (K + 5), h, w]."""
        return tuple(
            _mean_over_time(level(x), self.steps.count) for x, level in zip(features, self.levels, strict=True)
        )


def _branch(plan: Plan, channels: int, hidden: int, outputs: int, bias: float) -> nn.Sequential:
    last = prediction(plan, hidden, outputs)
    nn.init.constant_(last.conv.get_parameter("bias"), bias)
    return nn.Sequential(spike_conv(plan, channels, hidden, 3), spike_conv(plan, hidden, hidden, 3), last)


def _mean_over_time(x: Tensor, timesteps: int) -> Tensor:
    return x if timesteps == 1 else x.unflatten(0, (timesteps, -1)).mean(0)
