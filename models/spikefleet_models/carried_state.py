"""Membrane state that outlives a window: a network reads a recording window by window as if it were one long one.

    state = None
    for frames in windows:                                   # [T, B, C, H, W], consecutive in each lane
        y, state = with_state(network, frames, state)
        state = state.detach()                               # truncated back-propagation through time

A lane is a position in the batch that reads one recording after the other. The state is the voltage after reset, one
tensor [B, ...] for each neuron layer. Two windows with the state carried compute what one window of twice the length
does, where batch norms use their running statistics; without `detach` their gradients are equal too. Networks without
neurons (ANN twins) have no state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spikefleet_models.neurons import SpikingNode, spiking_nodes
from spikefleet_models.slots import ThermometerNode


@dataclass(frozen=True)
class CarriedState:
    """The membranes of a network between two windows."""

    membranes: Mapping[str, Tensor]
    """Layer -> voltage [B, ...] after the last step, at least fp32. A network's binary form has the same layers."""
    rest: Mapping[str, float]
    """Layer -> voltage of the reset state."""

    @property
    def lanes(self) -> int:
        """B."""
        return len(next(iter(self.membranes.values())))

    def detach(self) -> "CarriedState":
        """The same values without their history: gradients end here."""
        return replace(self, membranes={name: v.detach() for name, v in self.membranes.items()})

    def to(self, device: torch.device | str) -> "CarriedState":
        """The state on a device."""
        return replace(self, membranes={name: v.to(device) for name, v in self.membranes.items()})

    def restart(self, lanes: Tensor) -> "CarriedState":
        """Put lanes into the reset state, as at the start of a recording.

        Args:
            lanes: bool [B].

        Raises:
            ValueError: `lanes` is not bool [B].
        """
        if lanes.dtype != torch.bool or lanes.shape != (self.lanes,):
            raise ValueError(
                f"lanes is {lanes.dtype} of shape {list(lanes.shape)}, expected torch.bool of shape [{self.lanes}]: "
                "one value for each sample of the batch"
            )
        restarted = {}
        for name, v in self.membranes.items():
            chosen = lanes.to(v.device).view(-1, *[1] * (v.ndim - 1))
            restarted[name] = torch.where(chosen, v.new_full((), self.rest[name]), v)
        return replace(self, membranes=restarted)

    def tensors(self) -> dict[str, Tensor]:
        """Copies for a checkpoint: layer -> voltage, on the CPU."""
        return {name: v.detach().cpu().clone() for name, v in self.membranes.items()}


def restore_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> CarriedState:
    """The state whose `tensors()` were saved, on the CPU.

    Raises:
        ValueError: the layers are not those of the network, the numbers of lanes differ, or a value is not finite.
    """
    nodes = _layers(network)
    _check_layers(nodes, tensors)
    if len({len(v) for v in tensors.values()}) > 1:
        raise ValueError("the layers of a carried state have different numbers of lanes; it does not belong together")
    for name, v in tensors.items():
        if not v.isfinite().all():
            raise ValueError(f"the carried state of layer {name} is not finite; start from the reset state")
    return CarriedState(dict(tensors), _rest(nodes))


def with_state(network: nn.Module, x: Tensor, state: CarriedState | None = None) -> tuple[Any, CarriedState]:
    """Run a network on a window, from a state.

    Args:
        network: any network of this package; each of its neuron layers runs once in a forward pass.
        x: frames [T, B, C, H, W], or images [B, C, H, W].
        state: after the window before; None is the reset state.

    Returns:
        (what the network returns, the state after the window).

    Raises:
        ValueError: the network has no neurons, or the state is that of another network, batch size or image size.
    """
    with carried(network, state) as carrier:
        y = network(x)
    return y, carrier.state


class Carrier:
    """What `carried` gives: the state after the forward pass inside it."""

    def __init__(self) -> None:
        self._state: CarriedState | None = None

    @property
    def state(self) -> CarriedState:
        """The state after the pass.

        Raises:
            RuntimeError: the block has not ended.
        """
        if self._state is None:
            raise RuntimeError("the carried state is known when the block has ended")
        return self._state


@contextmanager
def carried(network: nn.Module, state: CarriedState | None = None) -> Iterator[Carrier]:
    """Have the one forward pass inside the block start from a state; `state` of the yielded object is the next one.

    For code that calls the network itself, as a task's loss does. Arguments and errors are those of `with_state`.
    """
    nodes = _layers(network)
    if not nodes:
        raise ValueError("the network has no spiking neurons, so it has no state to carry; train it without streams")
    if state is not None:
        _check_layers(nodes, state.membranes)
    carrier = Carrier()
    kept = {name: node.keep_state for name, node in nodes.items()}
    try:
        for name, node in nodes.items():
            node.reset()
            node.keep_state = True
            if state is not None:
                node.v = state.membranes[name]
        yield carrier
        membranes = {name: _membrane_of(name, node, state) for name, node in nodes.items()}
        carrier._state = CarriedState(membranes, _rest(nodes))
    finally:
        for name, node in nodes.items():
            node.keep_state = kept[name]
            node.reset()


def _layers(network: nn.Module) -> dict[str, SpikingNode]:
    """Neuron layers by name; names are those of the network inside data parallelism, and those of its integer form."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    layers = {}
    for name, node in spiking_nodes(network).items():
        parent, _, short = name.rpartition(".")
        in_slots = short == "node" and isinstance(network.get_submodule(parent), ThermometerNode)
        layers[parent if in_slots else name] = node
    return layers


def _rest(nodes: Mapping[str, SpikingNode]) -> dict[str, float]:
    return {name: float(node.v_reset or 0.0) for name, node in nodes.items()}


def _check_layers(nodes: Mapping[str, SpikingNode], tensors: Mapping[str, Tensor]) -> None:
    for name in (*nodes, *tensors):
        if name not in nodes or name not in tensors:
            has, lacks = ("network", "carried state") if name in nodes else ("carried state", "network")
            raise ValueError(
                f"the {has} has a layer {name!r} of neurons, the {lacks} has not; a state belongs to the network that "
                "computed it: start from the reset state"
            )


def _membrane_of(name: str, node: SpikingNode, state: CarriedState | None) -> Tensor:
    v = node.v
    if not isinstance(v, Tensor):
        raise ValueError(f"layer {name} did not run in the window, so it has no state to carry")
    if state is not None and v.shape != state.membranes[name].shape:
        raise ValueError(
            f"the carried state of layer {name} has shape {list(state.membranes[name].shape)}, but the window needs "
            f"{list(v.shape)}; keep batch size and image size, or start from the reset state"
        )
    return v
