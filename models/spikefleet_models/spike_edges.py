"""Which layers of a network are fed with spikes: found by following tensors through one forward pass.

A tensor is known by its storage, so every reshape keeps its origin, whatever the family's code looks like. A
convolution or linear layer is fed with spikes when its input is the output of a neuron, or what a gate or a max-pool
made of such outputs. Every other one is analogue, with a reason: its input is the pictures, another layer's real-valued
output, or an average of spikes.

What no hardware of binary events could run is refused: a neuron with D > 1 that feeds anything but a convolution or a
linear layer, and sums of spikes (SEW ResNet's ADD) that feed one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import SpikingNode, spiking_nodes


@dataclass(frozen=True)
class SpikeFed:
    """A layer whose input is spikes of `nodes`, which run `timesteps` T and emit at most `bound` D a step."""

    nodes: tuple[str, ...]
    timesteps: int
    bound: int


@dataclass(frozen=True)
class Analogue:
    """A layer whose input is not spikes, and why."""

    reason: str


LayerInput = SpikeFed | Analogue

Layer = nn.Conv2d | nn.Linear


def layer_inputs(network: nn.Module, images: Tensor | None = None) -> dict[str, LayerInput]:
    """What feeds each convolution and linear layer, in the order in which they run.

    Args:
        network: in eval mode; not changed.
        images: pictures [B, C, H, W] or frames [T, B, C, H, W] to follow; by default a noise picture of 64x64 pixels
            with the channels that `network.config` names.

    Raises:
        ValueError: the network has no spiking neuron, or uses spikes as binary events cannot be used.
    """
    if not spiking_nodes(network):
        raise ValueError("the network has no spiking neurons, so it has no spike-driven form")
    trace = _Trace(network)
    with torch.no_grad(), trace.watching():
        trace.follow(images if images is not None else noise_picture(network))
    return trace.inputs


def noise_picture(network: nn.Module) -> Tensor:
    """[1, C, 64, 64] in [0, 1], the same each time, of the type and on the device of the network.

    Raises:
        ValueError: the network does not say how many channels it takes.
    """
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if channels is None:
        raise ValueError("the network has no config.in_channels to make a picture from; give images")
    parameter = next(network.parameters())
    noise = torch.rand((1, channels, 64, 64), generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


class _Origin(NamedTuple):
    kind: Literal["pictures", "real", "spikes", "derived"]
    """`derived` is what any other operation made of spikes."""
    text: str = ""
    nodes: tuple[str, ...] = ()
    timesteps: int = 0
    bound: int = 1
    operations: tuple[str, ...] = ()


_KEEPS_SPIKES = frozenset({"clone", "_to_copy", "max_pool2d_with_indices", "upsample_nearest2d", "upsample_nearest3d"})
"""Operations on spikes [T, ...] whose result is spikes, and that act on each binary slot alone."""
_READS_SHAPE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_full"})
_KEEPS_INTEGERS = frozenset({"add", "add_", "sub", "rsub", "mul", "addcmul", "neg", "sum", "cat", "stack", "gate add"})


class _Trace(TorchDispatchMode):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inputs: dict[str, LayerInput] = {}
        self._network = network
        # A weak reference keeps the storage's identity from being given to another tensor, but not its memory.
        self._origins: dict[StorageWeakRef, _Origin] = {}
        self._inside = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on neurons, gates and layers: each is one operation, whatever it does inside."""
        hooks = {SpikingNode: self._after_node, Gate | LearnedGate: self._after_gate, Layer: self._after_layer}
        with ExitStack() as stack:
            for name, module in self._network.named_modules():
                for kind, after in hooks.items():
                    if isinstance(module, kind):
                        stack.callback(module.register_forward_pre_hook(self._enter).remove)
                        stack.callback(module.register_forward_hook(_named(after, name)).remove)
            yield

    def follow(self, images: Tensor) -> None:
        self._set(images, _Origin("pictures"))
        with self:
            outputs = self._network(images)
        for output in tree_leaves(outputs):
            origin = self._get(output) if isinstance(output, Tensor) else None
            if origin is not None and origin.bound > 1:
                raise ValueError(
                    f"neuron {', '.join(origin.nodes)} (D={origin.bound}) is an output of the network; binary slots "
                    "must end in a layer"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._after_operation(func, (args, kwargs), result)
        return result

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[StorageWeakRef(tensor.untyped_storage())] = origin

    def _get(self, tensor: Tensor) -> _Origin | None:
        return self._origins.get(StorageWeakRef(tensor.untyped_storage()))

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inside += 1

    def _after_node(self, name: str, node: Any, inputs: tuple[Tensor, ...], emitted: Tensor) -> None:
        self._inside -= 1
        self._set(emitted, _Origin("spikes", "", (name,), emitted.shape[0], node.bound))

    def _after_gate(self, name: str, gate: Gate | LearnedGate, inputs: tuple[Tensor, ...], joined: Tensor) -> None:
        self._inside -= 1
        origins = [origin for origin in map(self._get, inputs) if origin is not None]
        operation = f"gate {gate.name}" if isinstance(gate, Gate) else "gate bsg_star"
        merged = self._merge(operation, origins)
        if operation != "gate add" and all(origin.kind == "spikes" for origin in origins):
            merged = merged._replace(kind="spikes", operations=())
        self._set(joined, merged)

    def _after_layer(self, name: str, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inside -= 1
        found = self._classify(name, inputs[0])
        earlier = self.inputs.setdefault(name, found)
        if isinstance(earlier, SpikeFed) and isinstance(found, SpikeFed):
            nodes = tuple(dict.fromkeys(earlier.nodes + found.nodes))
            self.inputs[name] = SpikeFed(nodes, found.timesteps, found.bound)
            agree = (earlier.timesteps, earlier.bound) == (found.timesteps, found.bound)
        else:
            agree = isinstance(earlier, Analogue) and isinstance(found, Analogue)
        if not agree:
            raise ValueError(f"layer {name} runs more than once, on {earlier} and on {found}; give each its own layer")
        self._set(output, _Origin("real", f"the output of {name}"))

    def _classify(self, name: str, x: Tensor) -> LayerInput:
        origin = self._get(x)
        if origin is None:
            return Analogue("its input does not depend on the pictures")
        if origin.kind == "spikes":
            return SpikeFed(origin.nodes, origin.timesteps, origin.bound)
        if origin.kind == "pictures":
            return Analogue("its input is the pictures")
        if origin.kind == "real":
            return Analogue(f"its input is real-valued, from {origin.text}")
        operations = ", ".join(origin.operations)
        if not _KEEPS_INTEGERS.issuperset(origin.operations) or not torch.equal(x, x.round()):
            return Analogue(f"its input is real-valued, computed from spikes by {operations}")
        # Whatever this picture's sums come to, ADD's can exceed 1. Formulas by hand are judged by their values.
        if "gate add" in origin.operations or x.abs().max() > 1:
            raise ValueError(
                f"layer {name} is fed with integers computed from the spikes of {', '.join(origin.nodes)} by "
                f"{operations}, not with binary events; join spikes with a gate that keeps them binary "
                "(bsg, bsg_star, and, iand)"
            )
        return SpikeFed(origin.nodes, origin.timesteps, origin.bound)

    def _after_operation(self, func: Any, arguments: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        origins = [origin for origin in map(self._get, tensors) if origin is not None]
        name = func._schema.name.removeprefix("aten::")
        if not origins or name in _READS_SHAPE:
            return
        sources = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
        for output in tree_leaves(result):
            if not isinstance(output, Tensor):
                continue
            is_view = StorageWeakRef(output.untyped_storage()) in sources and not func._schema.is_mutable
            if is_view:
                continue
            if name in _KEEPS_SPIKES and all(origin.kind == "spikes" for origin in origins):
                self._set(output, origins[0])
            else:
                self._set(output, self._merge(name, origins))

    def _merge(self, operation: str, origins: list[_Origin]) -> _Origin:
        """The origin of what an operation makes of its inputs.

        Raises:
            ValueError: the operation cannot be done on the binary slots of an input.
        """
        of_spikes = [origin for origin in origins if origin.kind in ("spikes", "derived")]
        for origin in of_spikes:
            # A convolution by hand would escape the bookkeeping of biases even for one slot.
            if origin.bound > 1 or "convolution" in operation:
                raise ValueError(
                    f"neuron {', '.join(origin.nodes)} (D={origin.bound}) feeds {operation}; a spike-driven network "
                    "lets integers feed only nn.Conv2d and nn.Linear layers, and spikes no convolution but these"
                )
        if of_spikes:
            nodes = tuple(dict.fromkeys(node for origin in of_spikes for node in origin.nodes))
            operations = tuple(dict.fromkeys([*(o for origin in of_spikes for o in origin.operations), operation]))
            return _Origin("derived", "", nodes, max(origin.timesteps for origin in of_spikes), 1, operations)
        real = [origin for origin in origins if origin.kind == "real"]
        return real[0] if real else origins[0]


def _named(after: Any, name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        after(name, module, inputs, output)

    return hook
