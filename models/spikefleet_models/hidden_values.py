"""Whether constants on the way to a neuron hang on spikes in a way that `spike_flow.py` cannot follow.

A number that Python makes of spikes without an operation, as `len(repr(spikes))`, or a tensor into which another thread
or NumPy writes, looks like a constant. But a constant stays as it is when the neurons emit something else. So the
network is traced again on the same image, with drawn integers in place of what each neuron emits; and up to each neuron
the operations, their numbers and the values of what does not depend on spikes must be the same; so must a current to
which no spikes lead.

What changes a current itself unseen, in another thread or through memory shared before, is not found: a current may
depend on spikes.
"""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_flow import Operation, SpikeFlow
from spikefleet_models.spike_origins import Origin

_DRAWS = 2

_Entry = tuple[Any, ...]


def check_hidden_values(network: nn.Module, sample: Tensor) -> None:
    """Trace a network with its own and with drawn spikes.

    Args:
        network: in eval mode; not changed.
        sample: an image [1, C, H, W], or frames [T, 1, C, H, W].

    Raises:
        NotSpikeDrivenError: what should be constant changes with the spikes.
    """
    own = _Log(network)
    own.follow(sample.clone())
    for seed in range(_DRAWS):
        drawn = _Log(network, torch.Generator().manual_seed(seed))
        drawn.follow(sample.clone())
        _compare(own, drawn)


def _compare(own: "_Log", drawn: "_Log") -> None:
    seen = 0
    for (name, end), (_, other) in zip(own.neurons, drawn.neurons, strict=False):
        pairs = zip(own.entries[seen:end], drawn.entries[seen:other], strict=False)
        differing = next((entry for entry, there in pairs if entry != there), None)
        if differing is not None or end != other:
            what = "the operations" if differing is None else f"a number or constant of {differing[0]}"
            raise NotSpikeDrivenError(
                f"{what} on the way to neuron {name} changes with the spikes, although it is not computed from them by "
                "operations that can be followed; compute with tensors, in one thread"
            )
        seen = end


class _Log(SpikeFlow):
    """Notes the operations up to each neuron, with all that should not depend on spikes."""

    def __init__(self, network: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__(network)
        self._generator = generator
        self.entries: list[_Entry] = []
        self.neurons: list[tuple[str, int]] = []
        """(name, entries before it) of each call."""
        self._current = 0
        """Checksum of what the neuron that runs is given."""

    def after_operation(self, operation: Operation) -> None:
        # A layer that pads by copying fills memory in which anything may stand.
        fills = operation.in_layer and operation.name == "copy_"
        leaves = tree_leaves(operation.args[1:] if fills else operation.args)
        numbers = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        constants = tuple(_checksum(leaf) for leaf in leaves if isinstance(leaf, Tensor) and self._is_constant(leaf))
        where = f"operation {operation.name}{f' in {self.module}' if self.module else ''}"
        self.entries.append((where, numbers, constants, operation.inputs))

    def after_neuron(self, name: str, fed_by: Origin | None) -> None:
        if fed_by is None or fed_by.kind == "image":
            # No operation on spikes led here, so none has been noted.
            self.entries.append(("its input", (), (self._current,), ()))
        self.neurons.append((name, len(self.entries)))

    def before_emission(self, current: Tensor, emitted: Tensor, bound: int) -> None:
        self._current = _checksum(current)
        if self._generator is not None:
            drawn = torch.randint(bound + 1, emitted.shape, generator=self._generator)
            emitted.copy_(drawn)

    def _is_constant(self, tensor: Tensor) -> bool:
        origin = self.origin(tensor)
        return origin is None or origin.kind == "image"


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
