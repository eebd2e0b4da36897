"""What multiplies in a forward pass, and on what: convolutions, matrix products, products of feature maps.

`spike_flow.py` finds what is spikes and what is real-valued, for this and for the proof of `equivalence.py`:

* Spikes are what a neuron emits, 0 and 1 or an integer that D binary slots carry, and what gates and selections
  (max-pool, concatenation, copies) make of it. Sums of spikes (SEW ResNet's ADD) are integers that no slots carry.
  Everything else that depends on the image is real-valued: currents, averages of spikes, the image itself, be its
  values integers or not. Event frames that are declared binary are spikes.
* An operation with spikes on one side adds weights up (AC); one on integers or real values multiplies (MAC).
* Products that do not depend on the image can be computed once and are not counted. Neither are batch norms,
  additions, pooling, factors that are plain numbers, and what happens inside neurons and gates.

Sums over many multiplications are counted the way the papers do: dense operations times the mean of the input (Zhang
et al. 2023, eq 19; Luo et al. 2024, eq 17). `synaptic_operations` counts how often a spike really meets a weight, which
differs where zero padding and strides treat border and inner pixels unlike.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.spike_flow import Operation as FlowOperation
from spikefleet_models.spike_flow import SpikeFlow

Operation = Literal["convolution", "matrix product", "product"]
FedBy = Literal["spikes", "integers", "real"]


@dataclass(frozen=True)
class LayerCount:
    """One kind of operation in one module, per image, over all its calls and steps."""

    layer: str
    """Name of the innermost module that runs it."""
    operation: Operation
    spike_fed: bool
    """Whether the input is spikes, so that it adds up weights."""
    bound: int
    """The most that one value of the input can be: D for spikes, what they sum up to for integers; 0 for real input."""
    dense: float
    """Multiplications of real numbers that it would take: T times those of a layer that runs T times."""
    accumulated: float | None
    """`dense` times the mean of the input: an n from a neuron counts as n spikes. None without spikes or images."""
    synaptic_operations: float | None
    """Spikes times the weights each of them meets. None like `accumulated`."""
    integer_fed: bool = False
    """Whether the input is integers that no neuron's D slots carry (sums of spikes), so that it multiplies."""


@dataclass(frozen=True)
class OperationCounts:
    """What `count_operations` found."""

    layers: tuple[LayerCount, ...]
    """In the order in which they first run."""
    images: int


@torch.no_grad()
def count_operations(
    network: nn.Module, batches: Iterable[Tensor], measure: bool = True, binary_input: bool = False
) -> OperationCounts:
    """Run a network once on each batch and count; the result does not depend on how images are batched.

    Args:
        network: in eval mode; not changed.
        batches: images [B, C, H, W] or frames [T, B, C, H, W].
        measure: false leaves spikes uncounted, which works on the meta device too.
        binary_input: whether batches are event frames of 0 and 1, so that they are spikes.

    Raises:
        ValueError: there are no images; or `binary_input`, and frames hold something else.
    """
    counter = _Counter(network, measure, binary_input)
    images = 0
    for batch in batches:
        counter.follow(batch)
        images += batch.shape[batch.ndim - 4]
    if not images:
        raise ValueError("there are no images to count operations on; give at least one batch")
    layers = []
    for (name, operation, fed_by, bound), tally in counter.tallies.items():
        counted = measure and fed_by == "spikes"
        layers.append(
            LayerCount(
                layer=name,
                operation=operation,
                spike_fed=fed_by == "spikes",
                bound=bound,
                dense=tally.dense / images,
                accumulated=tally.accumulated / images if counted else None,
                synaptic_operations=tally.events / images if counted else None,
                integer_fed=fed_by == "integers",
            )
        )
    return OperationCounts(tuple(layers), images)


def on_meta(network: nn.Module) -> nn.Module:
    """Return a copy on the meta device."""
    kept: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        bare = torch.empty_like(tensor, device="meta")
        kept[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(network, kept)


# Positions of the two factors among the arguments.
_MATRIX_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_PRODUCTS = frozenset({"mul", "mul_"})


@dataclass
class _Tally:
    dense: int = 0
    accumulated: float = 0.0
    events: float = 0.0


class _Counter(SpikeFlow):
    def __init__(self, network: nn.Module, measure: bool, binary_input: bool) -> None:
        super().__init__(network, binary_input)
        self.tallies: dict[tuple[str, Operation, FedBy, int], _Tally] = {}
        self._measure = measure

    def after_operation(self, operation: FlowOperation) -> None:
        self._count(operation.name, operation.args, operation.result)

    def _fed_by(self, tensor: Tensor) -> tuple[FedBy, int]:
        """What a factor is, and the most that one of its values can be, if that is known."""
        origin = self.origin(tensor)
        if origin is None or not origin.is_spiking or not origin.bound:
            return "real", 0
        return ("spikes" if origin.is_binary_in_slots else "integers"), origin.bound

    def _is_spikes(self, tensor: Tensor) -> bool:
        return self._fed_by(tensor)[0] == "spikes"

    def _count(self, name: str, args: Any, result: Any) -> None:
        if name == "convolution":
            x, weight = args[0], args[1]
            if args[6]:
                raise ValueError(f"{self.module} is a transposed convolution, for which there is no rule")
            self._add("convolution", result.numel() * weight[0].numel(), (x,), lambda: _convolution_events(args))
        elif name in _MATRIX_PRODUCTS:
            a, b = (args[position] for position in _MATRIX_PRODUCTS[name])
            self._add("matrix product", a.numel() * b.shape[-1], (a, b), lambda: self._matrix_events(a, b))
        elif name in _PRODUCTS and isinstance(args[1], Tensor):
            a, b = args[0], args[1]
            if self.origin(a) is not None and self.origin(b) is not None:
                self._add("product", result.numel(), (a, b), lambda: self._product_events(a, b))

    def _add(self, operation: Operation, dense: int, factors: tuple[Tensor, ...], events: Callable[[], Tensor]) -> None:
        spiking = [x for x in factors if self._is_spikes(x)]
        # Spikes on one side decide: they add up what is on the other, integers or real values.
        fed_by, bound = max((self._fed_by(x) for x in spiking or factors), key=lambda fed: fed[1])
        tally = self.tallies.setdefault((self.module, operation, fed_by, bound), _Tally())
        tally.dense += dense
        if not spiking or not self._measure:
            return
        met = events().item()
        tally.events += met
        if len(spiking) == 1:
            # A mean per batch: all its images have one size.
            tally.accumulated += dense * spiking[0].sum(dtype=torch.float64).item() / max(spiking[0].numel(), 1)
        else:
            tally.accumulated += met  # a spike adds up only where the other factor has one too

    def _matrix_events(self, a: Tensor, b: Tensor) -> Tensor:
        if self._is_spikes(a) and self._is_spikes(b):
            return (a.double() @ b.double()).sum()
        if self._is_spikes(a):
            return a.sum(dtype=torch.float64) * b.shape[-1]
        return b.sum(dtype=torch.float64) * a.shape[-2]

    def _product_events(self, a: Tensor, b: Tensor) -> Tensor:
        if self._is_spikes(a) and self._is_spikes(b):
            return (a * b).sum(dtype=torch.float64)
        spikes, other = (a, b) if self._is_spikes(a) else (b, a)
        return spikes.expand(torch.broadcast_shapes(a.shape, other.shape)).sum(dtype=torch.float64)


def _convolution_events(args: Any) -> Tensor:
    """Spikes of a convolution's input times the weights that each meets: a convolution with ones, group by group."""
    x, weight, stride, padding, dilation, groups = args[0], args[1], args[3], args[4], args[5], args[8]
    # Sums of integers, exact in fp32.
    by_group = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1)).sum(2)
    ones = torch.ones((groups, 1, *weight.shape[2:]), dtype=by_group.dtype, device=x.device)
    met = F.conv2d(by_group, ones, None, stride, padding, dilation, groups)
    return met.sum(dtype=torch.float64) * (weight.shape[0] // groups)
