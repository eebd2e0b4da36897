"""What a binary program is made of: neurons, gates and layers as single operations, which `torch.export` keeps whole.

The operations have shapes alone: they are traced, and run by `binary_program.run`.
"""

from functools import partial

import torch
from torch import Tensor, nn

from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import SpikingNode
from spikefleet_models.slots import Layer

NAMESPACE = "spikefleet"


@torch.library.custom_op(f"{NAMESPACE}::fire", mutates_args=())
def fire(currents: Tensor, name: str, slots: int) -> Tensor:
    """Neuron `name`: currents [T, ...] -> spikes [T * D, ...], D = `slots`."""
    raise NotImplementedError("it is only traced")


@fire.register_fake
def _fire_shape(currents: Tensor, name: str, slots: int) -> Tensor:
    return currents.new_empty((currents.shape[0] * slots, *currents.shape[1:]))


@torch.library.custom_op(f"{NAMESPACE}::gate", mutates_args=())
def gate(residual: Tensor, shortcut: Tensor, name: str) -> Tensor:
    """Gate `name` of spikes H and X [..., C, H, W]."""
    raise NotImplementedError("it is only traced")


@gate.register_fake
def _gate_shape(residual: Tensor, shortcut: Tensor, name: str) -> Tensor:
    return torch.empty_like(residual)


@torch.library.custom_op(f"{NAMESPACE}::layer", mutates_args=())
def layer(x: Tensor, name: str, slots: int, shape: list[int]) -> Tensor:
    """Layer `name`: [T * D * B, ...] -> [T * B, ...] (or the same with B an axis); D = `slots`."""
    raise NotImplementedError("it is only traced")


@layer.register_fake
def _layer_shape(x: Tensor, name: str, slots: int, shape: list[int]) -> Tensor:
    return x.new_empty((x.shape[0] // slots, *shape))


class TracedNeuron(nn.Module):
    """A neuron in binary form."""

    def __init__(self, name: str, node: SpikingNode) -> None:
        super().__init__()
        self.name = name
        self.slots = node.bound

    def forward(self, currents: Tensor) -> Tensor:
        """Trace a neuron."""
        return fire(currents, self.name, self.slots)


class TracedGate(nn.Module):
    """A gate of spikes, or ADD, which is an addition."""

    def __init__(self, name: str, gate: Gate | LearnedGate) -> None:
        super().__init__()
        self.name = name
        self.adds = isinstance(gate, Gate) and gate.name == "add"

    def forward(self, residual: Tensor, shortcut: Tensor) -> Tensor:
        """Trace a gate."""
        return residual + shortcut if self.adds else gate(residual, shortcut, self.name)


class TracedLayer(nn.Module):
    """A convolution or linear layer; fed with spikes where it has slots."""

    def __init__(self, name: str, wrapped: Layer, slots: int) -> None:
        super().__init__()
        self.name = name
        self.slots = slots
        self.out_shape = partial(_out_shape, wrapped)  # not a child, so that its weights are no inputs of the trace

    def forward(self, x: Tensor) -> Tensor:
        """Trace a layer."""
        return layer(x, self.name, self.slots, self.out_shape(x.shape))


def _out_shape(wrapped: Layer, shape: torch.Size) -> list[int]:
    """Of the output, without the leading axis."""
    if isinstance(wrapped, nn.Linear):
        return [*shape[1:-1], wrapped.out_features]
    sides = []
    for axis, side in enumerate(shape[-2:]):
        padding = wrapped.padding[axis]
        assert isinstance(padding, int), "every family pads by numbers"
        window = wrapped.dilation[axis] * (wrapped.kernel_size[axis] - 1) + 1
        sides.append((side + 2 * padding - window) // wrapped.stride[axis] + 1)
    return [wrapped.out_channels, *sides]
