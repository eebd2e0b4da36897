"""A small network for event frames that trains in seconds on one core: two convolutions and a linear classifier.

Ours, to find out what a data set needs: whether slices, their order or memory count. Stateless neurons, for comparison,
are `neuron: {kind: ilif, bound: 1, leak: 0}`.

    conv5x5, stride 2, BN PLIF; conv3x3, stride 2, BN PLIF      24, 48 channels; tau learned, 2 at first
    then                                                        decoder over T, mean over cells, linear classifier

On 17x17 frames a cell is one position of the last feature map, and the network has 23,724 parameters.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.decoders import RateDecoder, StepWeights, decode_over_time
from spikefleet_models.network_input import check_images
from spikefleet_models.neurons import build_neuron
from spikefleet_models.residual_block import ConvUnit
from spikefleet_models.small_event_net_config import SmallEventNetConfig as SmallEventNetConfig
from spikefleet_models.spiking_unit import SpikingUnit


class SmallEventNet(nn.Module):
    """The network of a `SmallEventNetConfig`."""

    def __init__(self, config: SmallEventNetConfig) -> None:
        super().__init__()
        self.config = config
        self.timesteps = config.simulated_timesteps
        self.layers = nn.Sequential()
        previous = config.in_channels
        for index, channels in enumerate(config.channels):
            kernel = 3 if index else 5
            conv = nn.Conv2d(previous, channels, kernel, stride=2, padding=kernel // 2, bias=False)
            activation = build_neuron(config.neuron) if config.is_spiking else nn.ReLU(inplace=True)
            self.layers.append(ConvUnit(conv, SpikingUnit(nn.BatchNorm2d(channels), activation, self.timesteps)))
            previous = channels
        self.decoder = StepWeights(config.timesteps) if config.uses_step_weights else RateDecoder()
        self.classifier = nn.Linear(previous * config.grid**2, config.num_classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Compute the logits [B, K].

        Args:
            frames: event frames [T, B, C, H, W], of any T with decoder=rate; or images [B, C, H, W].

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        return self._classify(self.decoder(self.forward_features(frames)))

    def forward_over_time(self, frames: Tensor) -> Tensor:
        """Compute the logits [T, B, K] after each of the T steps, in evaluation mode; the last are those of `forward`.

        Args:
            frames: as for `forward`.

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        decoded = decode_over_time(self.decoder, self.forward_features(frames))
        return self._classify(decoded.flatten(0, 1)).unflatten(0, decoded.shape[:2])

    def forward_features(self, frames: Tensor) -> Tensor:
        """Compute the last spikes [T, B, C, H, W].

        Args:
            frames: as for `forward`.

        Raises:
            ValueError: the shape or type of `frames` does not fit the configuration.
        """
        config = self.config
        check_images(frames, config.in_channels, self.timesteps if config.needs_all_timesteps else None)
        spikes: Tensor = self.layers(frames)
        return spikes

    def _classify(self, decoded: Tensor) -> Tensor:
        if decoded.shape[-2:] != (self.config.grid, self.config.grid):
            decoded = F.adaptive_avg_pool2d(decoded, self.config.grid)
        logits: Tensor = self.classifier(decoded.flatten(1))
        return logits
