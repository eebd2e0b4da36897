"""SG ResNet and its relatives: one residual network, told apart by how a block joins its shortcut.

Zhang et al., "Direct training high-performance spiking neural networks for object recognition and detection",
Front. Neurosci. 2023: section 3.2 and table 1 (network), eqs 12 to 15 (gates), section 3.4 (decoder).

    connection      network                                 block (F = conv BN SN conv BN, S the shortcut)
    bsg, bsg_star   SG ResNet                               gate(SN(F(S)), S)
    add, and, iand  SEW ResNet (Fang et al. 2021)           g(SN(F(S)), S)
    post_add        Spiking ResNet                          SN(F(S) + S)
    ann             ResNet (He et al. 2016), the ANN twin   ReLU(F(S) + S), one step

Where a block changes the shape, the shortcut is conv1x1-BN-SN; without SN for post_add and ann, which add before the
activation. Static images pass the stem's convolution and batch norm once; the result is the current of every step.

What the paper leaves open follows the SEW ResNet code, whose settings it uses: statistics over merged (T, B), Kaiming
fan-out convolutions, no zero-init, 1x1 shortcut convolutions (needed for its 11.22M parameters). Deviation: the ANN
twin decodes by its mean even where `decoder` says asd, since it has no spikes to decode.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from spikefleet_models.decoders import AttentionSpikeDecoder, RateDecoder
from spikefleet_models.gates import build_gate
from spikefleet_models.neurons import SURROGATES, NeuronConfig, SpikingNode, build_neuron
from spikefleet_models.spiking_unit import SpikingUnit

STEM_CHANNELS = 64


class SGResNetConfig(BaseModel):
    """A residual network; the defaults are SG ResNet18 for CIFAR-10."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["sg_resnet"] = "sg_resnet"
    stages: tuple[int, ...] = Field(
        (2, 2, 2, 2), min_length=1, description="Blocks a stage; all stages but the first halve H and W."
    )
    block: Literal["basic", "bottleneck"] = Field("basic", description="3x3, 3x3; or 1x1, 3x3, 1x1 times 4.")
    width: float = Field(1.0, gt=0.0, description="Channels of the first stage over 64; they double each stage.")
    stem: Literal["cifar", "strided", "imagenet"] = Field(
        "cifar", description="3x3 stride 1; 3x3 stride 2, for small members; or 7x7 stride 2 and 3x3 max-pool."
    )
    connection: Literal["bsg", "bsg_star", "add", "and", "iand", "post_add", "ann"] = Field(
        "bsg", description="How a block joins its shortcut; ann is the ANN twin."
    )
    gate_threshold: float = Field(0.5, gt=0.0, le=1.0, description="thr of BSG*; up to 1 the gate starts as H.")
    decoder: Literal["asd", "rate"] = Field("asd", description="Attention spike decoder or firing rate.")
    asd_channel_reduction: int = Field(16, ge=1, description="r of the ASD's channel attention.")
    asd_temporal_reduction: int = Field(1, ge=1, description="r_t of the ASD's temporal attention.")
    neuron: NeuronConfig = Field(default_factory=NeuronConfig, description="Every spiking neuron of the network.")
    timesteps: int = Field(4, ge=1, description="T; the ANN twin runs one step whatever this says.")
    in_channels: int = Field(3, ge=1, description="Channels of the pictures or event frames.")
    num_classes: int = Field(10, ge=1, description="Size of the logits.")
    zero_init_residual: bool = Field(False, description="Start the last batch norm of each block at gamma = 0.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SGResNetConfig":
        if any(blocks < 1 for blocks in self.stages):
            raise ValueError(f"stages={self.stages} has a stage without blocks; give each at least 1")
        if not (STEM_CHANNELS * self.width).is_integer():
            channels = STEM_CHANNELS * self.width
            raise ValueError(f"width={self.width} gives {channels} channels; choose a multiple of 1/64")
        if self.uses_asd:
            if self.stage_channels[-1] % self.asd_channel_reduction:
                raise ValueError(
                    f"asd_channel_reduction={self.asd_channel_reduction} must divide the last stage's "
                    f"{self.stage_channels[-1]} channels"
                )
            if self.timesteps % self.asd_temporal_reduction:
                raise ValueError(
                    f"asd_temporal_reduction={self.asd_temporal_reduction} must divide timesteps={self.timesteps}"
                )
        return self

    @property
    def base_channels(self) -> int:
        """Channels of the stem and, before expansion, of the first stage."""
        return int(STEM_CHANNELS * self.width)

    @property
    def stem_stride(self) -> int:
        """Pixels a cell of the first stage."""
        return {"cifar": 1, "strided": 2, "imagenet": 4}[self.stem]

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        expansion = 4 if self.block == "bottleneck" else 1
        return tuple(self.base_channels * 2**stage * expansion for stage in range(len(self.stages)))

    @property
    def simulated_timesteps(self) -> int:
        """T that really runs: 1 for the ANN twin."""
        return 1 if self.connection == "ann" else self.timesteps

    @property
    def uses_asd(self) -> bool:
        """Whether the network has an attention spike decoder; the ANN twin never has."""
        return self.decoder == "asd" and self.connection != "ann"


class Stem(nn.Module):
    """Encoder layer: analogue pictures to spikes."""

    def __init__(self, config: SGResNetConfig) -> None:
        super().__init__()
        imagenet = config.stem == "imagenet"
        kernel, stride, padding = {"cifar": (3, 1, 1), "strided": (3, 2, 1), "imagenet": (7, 2, 3)}[config.stem]
        self.conv = nn.Conv2d(config.in_channels, config.base_channels, kernel, stride, padding, bias=False)
        self.unit = _unit(config, config.base_channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] or [T, B, C, H, W] -> [T, B, C', H', W']."""
        if images.ndim == 4:
            spikes = self.unit.repeat_over_time(self.conv(images))
        else:
            spikes = self.unit(self.conv(images.flatten(0, 1)))
        pooled: Tensor = self.pool(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        return pooled


class Shortcut(nn.Module):
    """conv1x1-BN-SN where a block changes the shape; conv1x1-BN where the shortcut is added before the activation."""

    def __init__(self, config: SGResNetConfig, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        self.unit = nn.BatchNorm2d(channels) if config.connection in ("post_add", "ann") else _unit(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] -> [T, B, C', H', W']."""
        y: Tensor = self.unit(self.conv(x.flatten(0, 1)))
        return y if y.ndim == 5 else y.unflatten(0, x.shape[:2])


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
        """[T, B, C, H, W] -> [T, B, C', H', W']."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for index, (conv, unit) in enumerate(zip(self.convs, self.units, strict=True)):
            z = conv(x.flatten(0, 1))
            x = unit(z, shortcut) if index + 1 == len(self.units) else unit(z)
        return x


class SGResNetBackbone(nn.Module):
    """Stem and stages of a `SGResNetConfig`: what a classifier and a detector share."""

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
        """The output [T, B, C, H, W] of every stage, first to last.

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
        """The output [T, B, C, H, W] of every block of every stage, first to last. Raises as `forward_features`."""
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
            raise ValueError(f"images has shape {shape}; give [B, C, H, W] or [T, B, C, H, W]")
        if not images.is_floating_point():
            raise ValueError(f"images has type {images.dtype}; convert and normalise it to floating point first")
        if images.shape[-3] != self.config.in_channels:
            raise ValueError(f"images has shape {shape}, but the network has in_channels={self.config.in_channels}")
        if images.ndim == 5 and images.shape[0] != self.timesteps:
            raise ValueError(
                f"images has shape {shape}, so T={shape[0]}, but the network runs timesteps={self.timesteps}"
            )

    def initialise(self) -> None:
        """Draw the weights; the network that owns the backbone does it last, so the order of random numbers is kept."""
        for module in (*self.stem.modules(), *self.stages.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, ResidualBlock) and self.config.zero_init_residual:
                last = module.units[-1].get_submodule("bn")
                nn.init.zeros_(last.get_parameter("weight"))


class SGResNet(SGResNetBackbone):
    """The network of a `SGResNetConfig`: stem, stages, decoder, global average pooling, linear classifier."""

    def __init__(self, config: SGResNetConfig) -> None:
        super().__init__(config)
        channels = config.stage_channels[-1]
        self.decoder = build_decoder(config, channels)
        self.classifier = nn.Linear(channels, config.num_classes)
        self.initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of pictures [B, C, H, W] or of T frames [T, B, C, H, W].

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        return self.forward_head(self.forward_features(images)[-1])

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits [B, K] of the last stage's output [T, B, C, H, W]."""
        logits: Tensor = self.classifier(self.decoder(features).mean((2, 3)))
        return logits


def build_decoder(config: SGResNetConfig, channels: int) -> nn.Module:
    """The decoder that a configuration asks for, of features with so many channels."""
    if not config.uses_asd:
        return RateDecoder()
    return AttentionSpikeDecoder(
        channels, config.simulated_timesteps, config.asd_channel_reduction, config.asd_temporal_reduction
    )


def _unit(config: SGResNetConfig, channels: int, joins_shortcut: bool = False) -> SpikingUnit:
    connection = config.connection
    activation: SpikingNode | nn.ReLU = nn.ReLU(inplace=True) if connection == "ann" else build_neuron(config.neuron)
    gate = None
    if joins_shortcut and connection != "post_add" and connection != "ann":
        surrogate_function = SURROGATES[config.neuron.surrogate](alpha=config.neuron.alpha)
        gate = build_gate(connection, channels, config.gate_threshold, surrogate_function)
    return SpikingUnit(
        nn.BatchNorm2d(channels),
        activation,
        timesteps=config.simulated_timesteps,
        gate=gate,
        post_add=joins_shortcut and connection in ("post_add", "ann"),
    )
