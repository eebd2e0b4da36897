"""SG ResNet, SEW ResNet, Spiking ResNet and ResNet: one residual network with different connections of the shortcut.

Zhang et al., "Direct training high-performance spiking neural networks for object recognition and detection",
Front. Neurosci. 2023: section 3.2 and table 1 (network), eqs 12 to 15 (gates), section 3.4 (decoder).

    connection      network                                 block (F = conv BN SN conv BN, S the shortcut)
    bsg, bsg_star   SG ResNet                               gate(SN(F(S)), S)
    add, and, iand  SEW ResNet (Fang et al. 2021)           g(SN(F(S)), S)
    post_add        Spiking ResNet                          SN(F(S) + S)
    ann             ResNet (He et al. 2016), the ANN twin   ReLU(F(S) + S), one step

Where a block changes the shape, the shortcut is conv1x1-BN-SN; without SN for post_add and ann, which add before the
activation. Static images pass the stem's convolution and batch norm once; the result is the current at every step.

What the paper leaves open follows the SEW ResNet code, whose settings it uses: statistics over merged (T, B), Kaiming
fan-out convolutions, no zero-init, 1x1 shortcut convolutions (needed for its 11.22M parameters). Deviation: the ANN
twin decodes by its mean even where `decoder` says asd, since it has no spikes to decode.
"""

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
from spikefleet_models.sg_resnet_config import SGResNetConfig as SGResNetConfig


class Stem(ConvUnit):
    """Encoder layer: analogue images, or frames, to spikes."""

    def __init__(self, config: SGResNetConfig) -> None:
        imagenet = config.stem == "imagenet"
        kernel, stride, padding = {"cifar": (3, 1, 1), "strided": (3, 2, 1), "imagenet": (7, 2, 3)}[config.stem]
        conv = nn.Conv2d(config.in_channels, config.base_channels, kernel, stride, padding, bias=False)
        super().__init__(conv, residual_unit(config, config.base_channels))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Encode images: [B, C, H, W] or [T, B, C, H, W] -> spikes [T, B, C', H', W']."""
        spikes = super().forward(x)
        pooled: Tensor = self.pool(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        note_spikes(pooled, noted_bound(spikes))
        return pooled


class SGResNetBackbone(nn.Module):
    """Stem and stages of a `SGResNetConfig`, shared by classifiers and detectors."""

    def __init__(self, config: SGResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.timesteps = config.simulated_timesteps
        self.stem = Stem(config)
        self.stages = nn.ModuleList()
        previous = config.base_channels
        for index, (blocks, channels) in enumerate(zip(config.stages, config.stage_channels, strict=True)):
            stage = nn.Sequential()
            for number in range(blocks):
                stride = 2 if index and number == 0 else 1
                stage.append(ResidualBlock(config, previous, channels, stride, config.block == "bottleneck"))
                previous = channels
            self.stages.append(stage)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the output [T, B, C, H, W] of every stage, first to last.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        self._check(images)
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage, from the one with the largest planes."""
        return [list(stage.children()) for stage in self.stages]

    def forward_blocks(self, images: Tensor) -> list[Tensor]:
        """Compute the output [T, B, C, H, W] of every block of every stage, first to last.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        self._check(images)
        x = self.stem(images)
        outputs = []
        for block in (block for stage in self.stages for block in stage.children()):
            x = block(x)
            outputs.append(x)
        return outputs

    def _check(self, images: Tensor) -> None:
        check_images(images, self.config.in_channels, self.timesteps if self.config.needs_all_timesteps else None)

    def initialise(self) -> None:
        """Initialise the weights; the owner of the backbone calls this last, so the random numbers keep their order."""
        for part in (self.stem, self.stages):
            initialise_residual(part, self.config)


class SGResNet(SGResNetBackbone):
    """The network of a `SGResNetConfig`: stem, stages, decoder, global average pooling, linear classifier."""

    def __init__(self, config: SGResNetConfig) -> None:
        super().__init__(config)
        channels = config.stage_channels[-1]
        self.decoder = build_decoder(config, channels)
        self.classifier = nn.Linear(channels, config.num_classes)
        self.initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Returns:
            Logits [B, K].

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        return self.forward_head(self.forward_features(images)[-1])

    def forward_over_time(self, images: Tensor) -> Tensor:
        """Compute the logits [T, B, K] after each of the T steps, in evaluation mode; the last are those of `forward`.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        decoded = decode_over_time(self.decoder, self.forward_features(images)[-1])
        logits: Tensor = self.classifier(decoded.mean((3, 4)))
        return logits

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute the logits [B, K] from the last stage's output [T, B, C, H, W]."""
        logits: Tensor = self.classifier(self.decoder(features).mean((2, 3)))
        return logits
