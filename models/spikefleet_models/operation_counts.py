"""What multiplies in a forward pass, and on what: convolutions, matrix products, products of feature maps.

Operations are seen where torch dispatches them, whichever module or function called them. A tensor is known by its
storage, so every reshape keeps its origin:

* What a spiking neuron emits are spikes, and so is what a gate makes of spikes, and what max-pooling, copying,
  concatenating or repeating leaves of them. Everything else that depends on the pictures is real-valued: currents,
  averages of spikes, the pictures themselves, be their values integers or not.
* An operation with spikes on one side adds weights up (AC); one on real values multiplies (MAC).
* Products that do not depend on the pictures can be computed once and are not counted. Neither are batch norms,
  additions, pooling, factors that are plain numbers, and what happens inside neurons and gates.

Sums over many multiplications are counted the way the papers do: dense operations times the mean of the input (Zhang
et al. 2023, eq 19; Luo et al. 2024, eq 17). `synaptic_operations` counts how often a spike really meets a weight, which
differs where zero padding and strides treat border and inner pixels unlike.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import SpikingNode
from spikefleet_models.spike_driven import ThermometerNode

Operation = Literal["convolution", "matrix product", "product"]


@dataclass(frozen=True)
class LayerCount:
    """One kind of operation in one module, per picture, over all its calls and steps."""

    layer: str
    """Name of the innermost module that runs it."""
    operation: Operation
    spike_fed: bool
    bound: int
    """The most that one value of the input can be, where it is spikes: D, or what ADD gates sum up to; else 0."""
    dense: float
    """Multiplications of real numbers that it would take: T times those of a layer that runs T times."""
    accumulated: float | None
    """`dense` times the mean of the input: integers n count as n spikes. None for real input or no pictures."""
    synaptic_operations: float | None
    """Spikes times the weights each of them meets. None like `accumulated`."""


@dataclass(frozen=True)
class OperationCounts:
    """What `count_operations` found."""

    layers: tuple[LayerCount, ...]
    """In the order in which they first run."""
    pictures: int


@torch.no_grad()
def count_operations(network: nn.Module, batches: Iterable[Tensor], measure: bool = True) -> OperationCounts:
    """Run a network once on each batch and count; the result does not depend on how pictures are batched.

    Args:
        network: in eval mode; not changed.
        batches: pictures [B, C, H, W] or frames [T, B, C, H, W].
        measure: false leaves spikes uncounted, which works on the meta device too.

    Raises:
        ValueError: there are no pictures.
    """
    counter = _Counter(network, measure)
    pictures = 0
    for images in batches:
        with counter.watching():
            counter.run(images)
        pictures += images.shape[images.ndim - 4]
    if not pictures:
        raise ValueError("there are no pictures to count operations on; give at least one batch")
    layers = []
    for (name, operation, bound), tally in counter.tallies.items():
        counted = measure and bound > 0
        layers.append(
            LayerCount(
                layer=name,
                operation=operation,
                spike_fed=bound > 0,
                bound=bound,
                dense=tally.dense / pictures,
                accumulated=tally.accumulated / pictures if counted else None,
                synaptic_operations=tally.events / pictures if counted else None,
            )
        )
    return OperationCounts(tuple(layers), pictures)


_KEEPS_SPIKES = frozenset(
    {"clone", "_to_copy", "copy_", "cat", "stack", "repeat", "index_select", "max_pool2d_with_indices"}
    | {"upsample_nearest2d", "upsample_nearest3d"}
)
_READS_SHAPE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_full"})
# Positions of the two factors among the arguments.
_MATRIX_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_PRODUCTS = frozenset({"mul", "mul_"})
_EMITTERS = (SpikingNode, ThermometerNode, Gate, LearnedGate)


@dataclass
class _Tally:
    dense: int = 0
    accumulated: float = 0.0
    events: float = 0.0


class _Counter(TorchDispatchMode):
    def __init__(self, network: nn.Module, measure: bool) -> None:
        super().__init__()
        self.tallies: dict[tuple[str, Operation, int], _Tally] = {}
        self._network = network
        self._measure = measure
        # The most that a value can be where a tensor is spikes, 0 where it is real; absent: not of the pictures. A weak
        # reference keeps the storage's identity from being given to another tensor, but not its memory.
        self._bounds: dict[StorageWeakRef, int] = {}
        self._running: list[str] = []
        self._inside = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on all modules. Spiking units call their neurons and gates one by one while they are watched."""
        with ExitStack() as stack:
            for name, module in self._network.named_modules():
                stack.callback(module.register_forward_pre_hook(self._push(name)).remove)
                stack.callback(module.register_forward_hook(self._pop).remove)
                if isinstance(module, _EMITTERS):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def run(self, images: Tensor) -> None:
        self._bounds = {}
        self._set(images, 0)
        with self:
            self._network(images)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._after_operation(func, args, kwargs or {}, result)
        return result

    def _push(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._running.append(name)

        return hook

    def _pop(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running.pop()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside += 1

    def _leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inside -= 1
        if isinstance(module, Gate | LearnedGate):
            joined = [self._bound(x) for x in inputs]
            adds = isinstance(module, Gate) and module.name == "add"
            self._set(output, (sum(joined) if adds else max(joined)) if all(joined) else 0)
        else:
            self._set(output, module.bound if isinstance(module, SpikingNode) else 1)

    def _set(self, tensor: Tensor, bound: int) -> None:
        self._bounds[StorageWeakRef(tensor.untyped_storage())] = bound

    def _get(self, tensor: Tensor) -> int | None:
        return self._bounds.get(StorageWeakRef(tensor.untyped_storage()))

    def _bound(self, tensor: Tensor) -> int:
        return self._get(tensor) or 0

    def _after_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        bounds = [bound for bound in map(self._get, tensors) if bound is not None]
        name = func._schema.name.removeprefix("aten::")
        if not bounds or name in _READS_SHAPE:
            return
        self._count(name, args, result)
        sources = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
        bound = max(bounds) if name in _KEEPS_SPIKES and all(bounds) else 0
        for output in tree_leaves(result):
            if not isinstance(output, Tensor):
                continue
            is_view = StorageWeakRef(output.untyped_storage()) in sources and not func._schema.is_mutable
            if not is_view:
                self._set(output, bound)

    def _count(self, name: str, args: Any, result: Any) -> None:
        if name == "convolution":
            x, weight = args[0], args[1]
            if args[6]:
                raise ValueError(f"{self._layer} is a transposed convolution, for which there is no rule")
            self._add("convolution", result.numel() * weight[0].numel(), (x,), lambda: _convolution_events(args))
        elif name in _MATRIX_PRODUCTS:
            a, b = (args[position] for position in _MATRIX_PRODUCTS[name])
            self._add("matrix product", a.numel() * b.shape[-1], (a, b), lambda: self._matrix_events(a, b))
        elif name in _PRODUCTS and isinstance(args[1], Tensor):
            a, b = args[0], args[1]
            if self._get(a) is not None and self._get(b) is not None:
                self._add("product", result.numel(), (a, b), lambda: self._product_events(a, b))

    @property
    def _layer(self) -> str:
        return self._running[-1] if self._running else ""

    def _add(self, operation: Operation, dense: int, factors: tuple[Tensor, ...], events: Callable[[], Tensor]) -> None:
        spiking = [x for x in factors if self._bound(x)]
        bound = max(map(self._bound, factors))
        tally = self.tallies.setdefault((self._layer, operation, bound), _Tally())
        tally.dense += dense
        if not spiking or not self._measure:
            return
        met = events().item()
        tally.events += met
        if len(spiking) == 1:
            # A mean per batch: all its pictures have one size.
            tally.accumulated += dense * spiking[0].sum(dtype=torch.float64).item() / max(spiking[0].numel(), 1)
        else:
            tally.accumulated += met  # a spike adds up only where the other factor has one too

    def _matrix_events(self, a: Tensor, b: Tensor) -> Tensor:
        if self._bound(a) and self._bound(b):
            return (a.double() @ b.double()).sum()
        if self._bound(a):
            return a.sum(dtype=torch.float64) * b.shape[-1]
        return b.sum(dtype=torch.float64) * a.shape[-2]

    def _product_events(self, a: Tensor, b: Tensor) -> Tensor:
        if self._bound(a) and self._bound(b):
            return (a * b).sum(dtype=torch.float64)
        spikes, other = (a, b) if self._bound(a) else (b, a)
        return spikes.expand(torch.broadcast_shapes(a.shape, other.shape)).sum(dtype=torch.float64)


def _convolution_events(args: Any) -> Tensor:
    """Spikes of a convolution's input times the weights that each meets: a convolution with ones, group by group."""
    x, weight, stride, padding, dilation, groups = args[0], args[1], args[3], args[4], args[5], args[8]
    # Sums of integers, exact in fp32.
    by_group = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1)).sum(2)
    ones = torch.ones((groups, 1, *weight.shape[2:]), dtype=by_group.dtype, device=x.device)
    met = F.conv2d(by_group, ones, None, stride, padding, dilation, groups)
    return met.sum(dtype=torch.float64) * (weight.shape[0] // groups)
