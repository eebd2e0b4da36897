"""SpikeYOLO for object detection.

Luo et al., "Integer-valued training and spike-driven inference spiking neural network for high-performance and
energy-efficient object detection", ECCV 2024, arXiv 2407.20708; figure 1, section 3.2, eqs 2 to 7.

    backbone   7x7 stem, then four stages: SNN-Block-1 x3d, x6d (strides 4, 8), SNN-Block-2 x9d, x3d (strides 16, 32),
               SpikeSPPF
    neck       top-down, then bottom-up, as YOLOv8's, with one block per position
    head       decoupled, anchor-free, 16 bins per side of a box; the mean over T is taken on its outputs

Variants of table 5 by configuration: `reparameterise=False`, `low_block="block2"`, `high_block="transformer"`,
`head="anchor"`; the ANN twin of table 2 is `activation="relu"`.

Sizes follow the published table of layers; the 48.1M and 68.8M members come out at 47.84M and 68.48M, as
the authors' own configuration files say, and need neck_ratio 2.

Deviations:
* A static image passes the stem once and is repeated after its batch norm; the statistics are the same, the running
  variance's n / (n - 1) sees B instead of T * B images.
* The MLP of the transformer variant is made of 1x1 convolutions and 2d batch norms, which compute the same numbers.
  Attention neurons have no threshold of their own.
* `reparameterise=False` keeps the neurons' state over T; the first released code ran it over the batch.
* The ANN twin's activation was not published: ReLU here.
* The anchor head has no published loss or initialisation, and none here.
* `stem_stride=2` and `box_channels` are ours, for small images.
"""

import torch
from torch import Tensor, nn

from spikefleet_models.spike_yolo.blocks import (
    Block1,
    Block2,
    Plan,
    SpikeSPPF,
    Stem,
    TransformerBlock,
    check_yolo_images,
    spike_conv,
)
from spikefleet_models.spike_yolo.config import SpikeYoloConfig
from spikefleet_models.spike_yolo.head import AnchorHead, DecoupledHead

STAGE_RATIOS = (4, 4, 3, 2)
"""Expansion of the blocks of the four stages."""

LAYERS = {
    1: "stem",
    2: "stages.0",
    3: "downs.0",
    4: "stages.1",
    5: "downs.1",
    6: "stages.2",
    7: "downs.2",
    8: "stages.3",
    9: "sppf",
    10: "reduce5",
    12: "top4",
    14: "lateral4",
    16: "top3",
    18: "lateral3",
    19: "out3",
    20: "down3",
    22: "out4",
    23: "down4",
    25: "out5",
    26: "head",
}
"""Number of a layer in the published table -> name of its module here; the other layers have no parameters."""


class SpikeYolo(nn.Module):
    """The network of a `SpikeYoloConfig`."""

    def __init__(self, config: SpikeYoloConfig) -> None:
        super().__init__()
        self.config = config
        self.timesteps = config.simulated_timesteps
        self.strides = config.strides
        neuron = None if config.activation == "relu" else config.neuron
        plan = Plan(neuron, self.timesteps, config.reparameterise)
        channels, (fine, middle, coarse) = config.stage_channels, config.pyramid_channels

        def low(width: int, ratio: int) -> nn.Module:
            return (Block1 if config.low_block == "block1" else Block2)(plan, width, ratio)

        def high(width: int, ratio: int) -> nn.Module:
            return TransformerBlock(plan, width) if config.high_block == "transformer" else Block2(plan, width, ratio)

        self.stem = Stem(plan, config.in_channels, channels[0], kernel=7, stride=config.stem_stride)
        self.stages = nn.ModuleList(
            nn.Sequential(*((low if stage < 2 else high)(width, ratio) for _ in range(repeats)))
            for stage, (width, ratio, repeats) in enumerate(
                zip(channels, STAGE_RATIOS, config.stage_repeats, strict=True)
            )
        )
        self.downs = nn.ModuleList(
            spike_conv(plan, channels[stage], channels[stage + 1], 3, stride=2, bias=True) for stage in range(3)
        )
        pooled = -(-channels[3] // 8) * 8
        self.sppf = SpikeSPPF(plan, channels[3], pooled)
        self.reduce5 = spike_conv(plan, pooled, channels[2])
        self.top4 = high(channels[2], 3)
        self.lateral4 = spike_conv(plan, 2 * channels[2], fine)
        self.top3 = low(fine, 4)
        self.lateral3 = spike_conv(plan, fine + channels[1], fine)
        self.out3 = low(fine, 4)
        self.down3 = spike_conv(plan, fine, fine, 3, stride=2)
        self.out4 = high(middle, 3)
        self.down4 = spike_conv(plan, middle, channels[2], 3, stride=2)
        self.out5 = high(coarse, config.neck_ratio)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.head: nn.Module
        if config.head == "anchor":
            self.head = AnchorHead(plan, config.pyramid_channels, config.num_classes)
        else:
            self.head = DecoupledHead(
                plan, config.pyramid_channels, config.strides, config.num_classes, config.box_channels
            )

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
        return [list(stage.children()) for stage in self.stages]

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the currents [T * B, C, h, w] of the levels that the head reads, finest first.

        Args:
            images: images [B, C, H, W], or any number T of frames [T, B, C, H, W].

        Raises:
            ValueError: shape, type or sides of `images` do not fit the network.
        """
        check_yolo_images(images, self.config.in_channels, self.strides[-1])
        x = self.stages[0](self.stem(images))
        stage3 = self.stages[1](self.downs[0](x))
        stage4 = self.stages[2](self.downs[1](stage3))
        stage5 = self.stages[3](self.downs[2](stage4))

        reduced5 = self.reduce5(self.sppf(stage5))
        lateral4 = self.lateral4(torch.cat((self.top4(self.upsample(reduced5)), stage4), dim=1))
        lateral3 = self.lateral3(torch.cat((self.top3(self.upsample(lateral4)), stage3), dim=1))

        out3 = self.out3(lateral3)
        out4 = self.out4(torch.cat((self.down3(out3), lateral4), dim=1))
        out5 = self.out5(torch.cat((self.down4(out4), reduced5), dim=1))
        return out3, out4, out5
