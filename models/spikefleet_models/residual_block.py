"""What residual spiking networks are made of: units, blocks with a gated or added shortcut, decoder, first weights.

`sg_resnet.py` and `seven_b_net.py` say where the parts stand; the formulas of the connections are in `gates.py`.
"""

from typing import Literal, Protocol

from torch import Tensor, nn

from spikefleet_models.decoders import AttentionSpikeDecoder, RateDecoder
from spikefleet_models.gates import GateGradient, GateName, build_gate
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import SpikingNode, build_neuron, firing_current
from spikefleet_models.reparam import fold_bn, fold_unit
from spikefleet_models.spiking_unit import SpikingUnit
from spikefleet_models.surrogates import build_surrogate


class ResidualSettings(Protocol):
    """What a configuration says about its blocks and its decoder; the configuration describes each."""

    @property
    def connection(self) -> GateName | Literal["post_add", "ann"]:
        """How a block combines with its shortcut; ann is the ANN twin."""
        ...

    @property
    def gate_gradient(self) -> GateGradient:
        """Gradient of BSG and BSG* to H."""
        ...

    @property
    def gate_threshold(self) -> float:
        """Threshold of BSG*: thr."""
        ...

    @property
    def asd_channel_reduction(self) -> int:
        """Reduction of the ASD's channel attention, r."""
        ...

    @property
    def asd_temporal_reduction(self) -> int:
        """Reduction of the ASD's temporal attention, r_t."""
        ...

    @property
    def neuron(self) -> NeuronConfig:
        """Every spiking neuron."""
        ...

    @property
    def norm_momentum(self) -> float:
        """Weight of a step's batch in running statistics."""
        ...

    @property
    def zero_init_residual(self) -> bool:
        """Whether blocks start as the identity."""
        ...

    @property
    def uses_asd(self) -> bool:
        """Whether there is an attention spike decoder."""
        ...

    @property
    def simulated_timesteps(self) -> int:
        """T that the decoder has weights for, and that a static image is repeated over."""
        ...


class ConvUnit(nn.Module):
    """Convolution, batch norm and neuron on images, frames or spikes."""

    def __init__(self, conv: nn.Conv2d, unit: SpikingUnit) -> None:
        super().__init__()
        self.conv = conv
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        """Compute spikes [T, B, C', H', W'] of [T, B, C, H, W], or of a static [B, C, H, W] for the configured T."""
        if x.ndim == 4:
            return self.unit.repeat_over_time(self.conv(x))
        spikes: Tensor = self.unit(self.conv(x.flatten(0, 1)), timesteps=x.shape[0])
        return spikes

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm and return the module itself."""
        self.conv, self.unit = fold_unit(self.conv, self.unit)
        return self


class Shortcut(nn.Module):
    """conv1x1-BN-SN where a block changes the shape; conv1x1-BN where the shortcut is added before the activation."""

    is_shortcut = True
    """Energy cards leave out such modules with `shortcuts=False`."""

    def __init__(self, config: ResidualSettings, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        joins_currents = config.connection in ("post_add", "ann")
        self.unit: nn.Module = batch_norm(config, channels) if joins_currents else residual_unit(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shortcut: [T, B, C, H, W] -> [T, B, C', H', W']."""
        z = self.conv(x.flatten(0, 1))
        if isinstance(self.unit, SpikingUnit):
            spikes: Tensor = self.unit(z, timesteps=x.shape[0])
            return spikes
        currents: Tensor = self.unit(z).unflatten(0, x.shape[:2])
        return currents

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm and return the module itself."""
        if isinstance(self.unit, SpikingUnit):
            self.conv, self.unit = fold_unit(self.conv, self.unit)
        else:
            self.conv, self.unit = fold_bn(self.conv, self.unit), nn.Identity()
        return self


class ResidualBlock(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 times 4) block."""

    def __init__(
        self, config: ResidualSettings, in_channels: int, channels: int, stride: int, bottleneck: bool = False
    ) -> None:
        super().__init__()
        if bottleneck:
            plan = [(1, 1, channels // 4), (3, stride, channels // 4), (1, 1, channels)]
        else:
            plan = [(3, stride, channels), (3, 1, channels)]
        self.convs = nn.ModuleList()
        self.units = nn.ModuleList()
        previous = in_channels
        for index, (kernel, conv_stride, out) in enumerate(plan):
            self.convs.append(nn.Conv2d(previous, out, kernel, conv_stride, kernel // 2, bias=False))
            self.units.append(residual_unit(config, out, joins_shortcut=index + 1 == len(plan)))
            previous = out
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = Shortcut(config, in_channels, channels, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [T, B, C, H, W] -> [T, B, C', H', W']."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        timesteps = x.shape[0]
        for index, (conv, unit) in enumerate(zip(self.convs, self.units, strict=True)):
            joined = shortcut if index + 1 == len(self.units) else None
            x = unit(conv(x.flatten(0, 1)), joined, timesteps)
        return x

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norms and return the module itself; the shortcut folds its own."""
        for index, unit in enumerate(self.units):
            assert isinstance(unit, SpikingUnit)
            self.convs[index], self.units[index] = fold_unit(self.convs[index], unit)
        return self


def initialise_residual(network: nn.Module, config: ResidualSettings) -> None:
    """Draw Kaiming fan-out convolutions, and make blocks the identity where the configuration says so."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, ResidualBlock) and config.zero_init_residual:
            last = module.units[-1].get_submodule("bn")
            nn.init.zeros_(last.get_parameter("weight"))
            if config.connection == "and":  # H AND X is X where H always fires
                nn.init.constant_(last.get_parameter("bias"), firing_current(config.neuron))


def build_decoder(config: ResidualSettings, channels: int) -> nn.Module:
    """Build the decoder of a configuration for features with `channels` channels."""
    if not config.uses_asd:
        return RateDecoder()
    return AttentionSpikeDecoder(
        channels, config.simulated_timesteps, config.asd_channel_reduction, config.asd_temporal_reduction
    )


def batch_norm(config: ResidualSettings, channels: int) -> nn.BatchNorm2d:
    """Build the batch norm of `channels` channels."""
    return nn.BatchNorm2d(channels, momentum=config.norm_momentum)


def residual_unit(config: ResidualSettings, channels: int, joins_shortcut: bool = False) -> SpikingUnit:
    """Build batch norm and neuron (ReLU of an ANN twin), with what joins a block's shortcut where one does."""
    connection = config.connection
    activation: SpikingNode | nn.ReLU = nn.ReLU(inplace=True) if connection == "ann" else build_neuron(config.neuron)
    gate = None
    if joins_shortcut and connection != "post_add" and connection != "ann":
        surrogate_function = build_surrogate(config.neuron)
        gate = build_gate(connection, channels, config.gate_threshold, surrogate_function, config.gate_gradient)
    return SpikingUnit(
        batch_norm(config, channels),
        activation,
        timesteps=config.simulated_timesteps,
        gate=gate,
        post_add=joins_shortcut and connection in ("post_add", "ann"),
    )
