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

from spikefleet_models.decoders import AttentionSpikeDecoder, RateDecoder
from spikefleet_models.gates import build_gate
from spikefleet_models.neurons import SpikingNode, build_neuron, firing_current
from spikefleet_models.reparam import fold_bn, fold_unit
from spikefleet_models.sg_resnet_config import SGResNetConfig as SGResNetConfig
from spikefleet_models.spiking_unit import SpikingUnit
from spikefleet_models.surrogates import build_surrogate


class Stem(nn.Module):
    """Encoder layer: analogue images to spikes."""

    def __init__(self, config: SGResNetConfig) -> None:
        super().__init__()
        imagenet = config.stem == "imagenet"
        kernel, stride, padding = {"cifar": (3, 1, 1), "strided": (3, 2, 1), "imagenet": (7, 2, 3)}[config.stem]
        self.conv = nn.Conv2d(config.in_channels, config.base_channels, kernel, stride, padding, bias=False)
        self.unit = _unit(config, config.base_channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Encode images: [B, C, H, W] or [T, B, C, H, W] -> spikes [T, B, C', H', W']."""
        if images.ndim == 4:
            spikes = self.unit.repeat_over_time(self.conv(images))
        else:
            spikes = self.unit(self.conv(images.flatten(0, 1)))
        pooled: Tensor = self.pool(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        return pooled

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm and return the module itself."""
        self.conv, self.unit = fold_unit(self.conv, self.unit)
        return self


class Shortcut(nn.Module):
    """conv1x1-BN-SN where a block changes the shape; conv1x1-BN where the shortcut is added before the activation."""

    is_shortcut = True
    """Energy cards leave out such modules with `shortcuts=False`."""

    def __init__(self, config: SGResNetConfig, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        joins_currents = config.connection in ("post_add", "ann")
        self.unit: nn.Module = _batch_norm(config, channels) if joins_currents else _unit(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shortcut: [T, B, C, H, W] -> [T, B, C', H', W']."""
        y: Tensor = self.unit(self.conv(x.flatten(0, 1)))
        return y if y.ndim == 5 else y.unflatten(0, x.shape[:2])

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm and return the module itself."""
        if isinstance(self.unit, SpikingUnit):
            self.conv, self.unit = fold_unit(self.conv, self.unit)
        else:
            self.conv, self.unit = fold_bn(self.conv, self.unit), nn.Identity()
        return self


class ResidualBlock(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 times 4) block."""

    def __init__(self, config: SGResNetConfig, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        if config.block == "basic":
            plan = [(3, stride, channels), (3, 1, channels)]
        else:
            plan = [(1, 1, channels // 4), (3, stride, channels // 4), (1, 1, channels)]
        self.convs = nn.ModuleList()
        self.units = nn.ModuleList()
        previous = in_channels
        for index, (kernel, conv_stride, out) in enumerate(plan):
            self.convs.append(nn.Conv2d(previous, out, kernel, conv_stride, kernel // 2, bias=False))
            self.units.append(_unit(config, out, joins_shortcut=index + 1 == len(plan)))
            previous = out
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = Shortcut(config, in_channels, channels, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [T, B, C, H, W] -> [T, B, C', H', W']."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for index, (conv, unit) in enumerate(zip(self.convs, self.units, strict=True)):
            z = conv(x.flatten(0, 1))
            x = unit(z, shortcut) if index + 1 == len(self.units) else unit(z)
        return x

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norms and return the module itself; the shortcut folds its own."""
        for index, unit in enumerate(self.units):
            assert isinstance(unit, SpikingUnit)
            self.convs[index], self.units[index] = fold_unit(self.convs[index], unit)
        return self


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
                stage.append(ResidualBlock(config, previous, channels, stride))
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
        shape = tuple(images.shape)
        if images.ndim not in (4, 5):
            raise ValueError(f"images: shape is {shape}, expected [B, C, H, W] or [T, B, C, H, W]")
        if not images.is_floating_point():
            raise ValueError(
                f"images: type is {images.dtype}, expected floating point; convert and normalise them first"
            )
        if images.shape[-3] != self.config.in_channels:
            raise ValueError(
                f"images: shape is {shape}, expected C={self.config.in_channels}; give images with that many channels "
                "or set in_channels"
            )
        if images.ndim == 5 and images.shape[0] != self.timesteps:
            raise ValueError(
                f"images: shape is {shape}, so T={shape[0]}, expected T={self.timesteps} of timesteps={self.timesteps}"
            )

    def initialise(self) -> None:
        """Initialise the weights; the owner of the backbone calls this last, so the random numbers keep their order."""
        for module in (*self.stem.modules(), *self.stages.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, ResidualBlock) and self.config.zero_init_residual:
                last = module.units[-1].get_submodule("bn")
                nn.init.zeros_(last.get_parameter("weight"))
                if self.config.connection == "and":  # H AND X is X where H always fires
                    nn.init.constant_(last.get_parameter("bias"), firing_current(self.config.neuron))


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

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute the logits [B, K] from the last stage's output [T, B, C, H, W]."""
        logits: Tensor = self.classifier(self.decoder(features).mean((2, 3)))
        return logits


def build_decoder(config: SGResNetConfig, channels: int) -> nn.Module:
    """Build the decoder of a configuration for features with `channels` channels."""
    if not config.uses_asd:
        return RateDecoder()
    return AttentionSpikeDecoder(
        channels, config.simulated_timesteps, config.asd_channel_reduction, config.asd_temporal_reduction
    )


def _batch_norm(config: SGResNetConfig, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=config.norm_momentum)


def _unit(config: SGResNetConfig, channels: int, joins_shortcut: bool = False) -> SpikingUnit:
    connection = config.connection
    activation: SpikingNode | nn.ReLU = nn.ReLU(inplace=True) if connection == "ann" else build_neuron(config.neuron)
    gate = None
    if joins_shortcut and connection != "post_add" and connection != "ann":
        surrogate_function = build_surrogate(config.neuron)
        gate = build_gate(connection, channels, config.gate_threshold, surrogate_function, config.gate_gradient)
    return SpikingUnit(
        _batch_norm(config, channels),
        activation,
        timesteps=config.simulated_timesteps,
        gate=gate,
        post_add=joins_shortcut and connection in ("post_add", "ann"),
    )
