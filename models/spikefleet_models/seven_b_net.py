"""7B-Net: seven residual blocks on event frames, each followed by max-pooling.

Fang et al., "Deep residual learning in spiking neural networks", NeurIPS 2021 (SEW ResNet): Wide-7B-Net on CIFAR10-DVS,
7B-Net on DVS Gesture. Zhang et al., Front. Neurosci. 2023, replace the addition by their gates and decode by ASD:

    before a block of another width     conv1x1 BN PLIF
    block                               gate(SN(F(S)), S), F = conv3x3 BN PLIF conv3x3 BN
    after each block                    2x2 max-pooling of spikes
    then                                decoder over T, mean over H and W, linear classifier

Seven pools take 128x128 frames to 1x1. Deviation for smaller frames: a side is pooled only while it is over 1, so
34x34 is pooled five times. What the papers leave open follows `sg_resnet.py`; both keep the network's 1x1 convolutions,
which give it its 1,192,218 parameters (wide) and 130,393 (narrow).
"""

from collections.abc import Iterator
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.decoders import decode_over_time
from spikefleet_models.network_input import check_images
from spikefleet_models.packed_spikes import note_spikes, noted_bound
from spikefleet_models.residual_block import (
    ConvUnit,
    ResidualBlock,
    build_decoder,
    initialise_residual,
    residual_unit,
)
from spikefleet_models.seven_b_net_config import SevenBNetConfig as SevenBNetConfig


class SevenBNet(nn.Module):
    """The network of a `SevenBNetConfig`."""

    def __init__(self, config: SevenBNetConfig) -> None:
        super().__init__()
        self.config = config
        self.timesteps = config.simulated_timesteps
        self.widenings = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        previous = config.in_channels
        for index, channels in enumerate(config.channels):
            if index == 0 or channels != previous:  # the first one also makes spikes of what comes in
                conv = nn.Conv2d(previous, channels, 1, bias=False)
                self.widenings[str(index)] = ConvUnit(conv, residual_unit(config, channels))
            self.blocks.append(ResidualBlock(config, channels, channels, stride=1))
            previous = channels
        self.decoder = build_decoder(config, previous)
        self.classifier = nn.Linear(previous, config.num_classes)
        for part in (self.widenings, self.blocks):
            initialise_residual(part, config)

    def forward(self, frames: Tensor) -> Tensor:
        """Compute the logits [B, K].

        Args:
            frames: event frames [T, B, C, H, W], of any T with decoder=rate; or images [B, C, H, W].

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        return self.forward_head(self.forward_features(frames)[-1])

    def forward_over_time(self, frames: Tensor) -> Tensor:
        """Compute the logits [T, B, K] after each of the T steps, in evaluation mode; the last are those of `forward`.

        Args:
            frames: as for `forward`.

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        decoded = decode_over_time(self.decoder, self.forward_features(frames)[-1])
        logits: Tensor = self.classifier(decoded.mean((3, 4)))
        return logits

    def forward_features(self, frames: Tensor) -> list[Tensor]:
        """Compute the pooled output [T, B, C, H, W] of the last block of each width, first to last.

        Args:
            frames: as for `forward`.

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        outputs = self.forward_blocks(frames)
        ends = []
        for _, blocks in groupby(range(len(outputs)), key=lambda index: self.config.channels[index]):
            ends.append(outputs[list(blocks)[-1]])
        return ends

    def forward_blocks(self, frames: Tensor) -> list[Tensor]:
        """Compute the pooled output [T, B, C, H, W] of every block, first to last.

        Args:
            frames: as for `forward`.

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        check_images(frames, self.config.in_channels, self.timesteps if self.config.needs_all_timesteps else None)
        return list(self._run(frames))

    def stage_blocks(self) -> list[list[nn.Module]]:
        """Each block, whose planes are half as large as those before it, from the one with the largest planes."""
        return [[block] for block in self.blocks]

    def _run(self, x: Tensor) -> Iterator[Tensor]:
        for index, block in enumerate(self.blocks):
            if str(index) in self.widenings:
                x = self.widenings[str(index)](x)
            x = pool_sides_over_one(block(x))
            yield x

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute the logits [B, K] from the last block's output [T, B, C, H, W]."""
        logits: Tensor = self.classifier(self.decoder(features).mean((2, 3)))
        return logits


def pool_sides_over_one(spikes: Tensor) -> Tensor:
    """Halve the sides over 1 of [T, B, C, H, W] by max-pooling."""
    height, width = spikes.shape[-2:]
    if height == width == 1:
        return spikes
    window = (2 if height > 1 else 1, 2 if width > 1 else 1)
    pooled = F.max_pool2d(spikes.flatten(0, 1), window).unflatten(0, spikes.shape[:2])
    note_spikes(pooled, noted_bound(spikes))
    return pooled
