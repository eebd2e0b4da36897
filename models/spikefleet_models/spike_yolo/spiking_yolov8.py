"""Spiking YOLOv8, the baseline of SpikeYOLO's table 2 (Luo et al., ECCV 2024).

YOLOv8 (Ultralytics, 2023) with each sequence of convolution, batch norm and activation replaced by neuron, convolution
and batch norm.

The m member has YOLOv8m's parameters and a bias in its stem. The authors released no code of the blocks; deviations
from YOLOv8 are the order above, residuals of currents, and the stem, which has no neuron.
"""

import torch
from torch import Tensor, nn

from spikefleet_models.spike_yolo.blocks import Plan, SpikeSPPF, Stem, check_yolo_images, spike_conv
from spikefleet_models.spike_yolo.config import SpikingYoloV8Config
from spikefleet_models.spike_yolo.head import DecoupledHead


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual or without."""

    def __init__(self, plan: Plan, channels: int, residual: bool) -> None:
        super().__init__()
        self.first = spike_conv(plan, channels, channels, 3)
        self.second = spike_conv(plan, channels, channels, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> the same shape."""
        y: Tensor = self.second(self.first(x))
        return x + y if self.residual else y


class C2f(nn.Module):
    """1x1, half of whose channels pass a chain of bottlenecks; 1x1 on the concatenation of all outputs."""

    def __init__(self, plan: Plan, in_channels: int, out_channels: int, repeats: int, residual: bool) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.split = spike_conv(plan, in_channels, 2 * hidden)
        self.bottlenecks = nn.ModuleList(Bottleneck(plan, hidden, residual) for _ in range(repeats))
        self.merge = spike_conv(plan, (2 + repeats) * hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        parts = list(self.split(x).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        y: Tensor = self.merge(torch.cat(parts, dim=1))
        return y


class SpikingYoloV8(nn.Module):
    """The network of a `SpikingYoloV8Config`."""

    def __init__(self, config: SpikingYoloV8Config) -> None:
        super().__init__()
        self.config = config
        self.timesteps = config.simulated_timesteps
        self.strides = config.strides
        plan = Plan(None if config.activation == "relu" else config.neuron, self.timesteps)
        c1, c2, c3, c4, c5 = (config.channels(published) for published in (64, 128, 256, 512, 1024))
        few, many = config.repeats(3), config.repeats(6)
        self.stem = Stem(plan, config.in_channels, c1, kernel=3, stride=2)
        self.downs = nn.ModuleList(
            spike_conv(plan, before, after, 3, stride=2) for before, after in ((c1, c2), (c2, c3), (c3, c4), (c4, c5))
        )
        self.stages = nn.ModuleList(
            C2f(plan, width, width, repeats, residual=True)
            for width, repeats in ((c2, few), (c3, many), (c4, many), (c5, few))
        )
        self.sppf = SpikeSPPF(plan, c5, c5)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4 = C2f(plan, c5 + c4, c4, few, residual=False)
        self.out3 = C2f(plan, c4 + c3, c3, few, residual=False)
        self.down3 = spike_conv(plan, c3, c3, 3, stride=2)
        self.out4 = C2f(plan, c3 + c4, c4, few, residual=False)
        self.down4 = spike_conv(plan, c4, c4, 3, stride=2)
        self.out5 = C2f(plan, c4 + c5, c5, few, residual=False)
        self.head = DecoupledHead(plan, (c3, c4, c5), config.strides, config.num_classes, config.box_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the raw outputs of the levels, finest first; see the head.

        Args:
            images: images [B, C, H, W], or any number T of frames [T, B, C, H, W].

        Raises:
            ValueError: shape, type or sides of `images` do not fit the network.
        """
        outputs: tuple[Tensor, ...] = self.head(self.forward_features(images))
        return outputs

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage of the backbone, from the one with the largest planes."""
        return [[stage] for stage in self.stages]

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the currents [T * B, C, h, w] of the levels that the head reads, finest first.

        Args:
            images: images [B, C, H, W], or any number T of frames [T, B, C, H, W].

        Raises:
            ValueError: shape, type or sides of `images` do not fit the network.
        """
        check_yolo_images(images, self.config.in_channels, self.strides[-1])
        x = self.stages[0](self.downs[0](self.stem(images)))
        stage3 = self.stages[1](self.downs[1](x))
        stage4 = self.stages[2](self.downs[2](stage3))
        stage5 = self.sppf(self.stages[3](self.downs[3](stage4)))
        top4 = self.top4(torch.cat((self.upsample(stage5), stage4), dim=1))
        out3 = self.out3(torch.cat((self.upsample(top4), stage3), dim=1))
        out4 = self.out4(torch.cat((self.down3(out3), top4), dim=1))
        out5 = self.out5(torch.cat((self.down4(out4), stage5), dim=1))
        return out3, out4, out5
