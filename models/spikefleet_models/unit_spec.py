"""What one call of a spiking unit computes, apart from its tensors; each form of the unit takes it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikefleet_models.gates import SAVES_SHORTCUT, GateGradient
from spikefleet_models.membrane import Dynamics, IntegerDynamics


class UnitSpec(NamedTuple):
    """Batch norm, neuron, gate and time of one call."""

    bn: nn.BatchNorm2d
    dynamics: Dynamics | IntegerDynamics
    gate: str | None
    """A gate without parameters, by its name."""
    gate_gradient: GateGradient
    post_add: bool
    """Whether the shortcut is added to the currents."""
    timesteps: int
    repeat: bool
    """Whether z is static: [B, C, H, W], the same current at each step."""

    @property
    def saves_shortcut(self) -> bool:
        """Whether backward reads the shortcut."""
        return self.post_add or SAVES_SHORTCUT.get(self.gate or "", False)

    def sequence(self, x: Tensor) -> Tensor:
        """View [T * B, C, H, W], or a static [B, C, H, W], as [T, B, C, H, W]."""
        if self.repeat:
            return x.expand(self.timesteps, *x.shape)
        return x.unflatten(0, (self.timesteps, -1))

    def empty_spikes(self, z: Tensor) -> Tensor:
        """Allocate [T, B, C, H, W] of z's type and memory layout."""
        layout = torch.channels_last if z.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        samples = z.shape[0] * (self.timesteps if self.repeat else 1)
        spikes = torch.empty((samples, *z.shape[1:]), dtype=z.dtype, device=z.device, memory_format=layout)
        return spikes.unflatten(0, (self.timesteps, -1))
