"""Gradient norm, firing rate and relative step of each layer: whether a network can train, seen before it is trained.

A gradient on its way to the first layer passes a surrogate, or a gate, at each spiking layer. A factor that is a little
off 1 is a power of the depth at the stem. `judge` compares the layers that feed neurons with the last of them, in the
trunk of the network, on which all its outputs depend: within a factor of 100 (`TRAINABLE`) one learning rate serves
all of them. Heads of a detector are left out, since the objects of a batch may all fall to one of its levels.

The relative step lr |dL/dW| / |W| is how far plain SGD moves a layer, as a fraction of its weights. Above 1
(`LARGEST_STEP`) a step replaces what the layer was; batch norm then makes it deaf, since its gradient falls with the
growing norm.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from spikefleet_models.health import SpikeMonitor
from spikefleet_models.neurons import spiking_nodes

TRAINABLE = (1e-2, 1e2)
"""Gradient norm of a layer over that of the last one before neurons: what is outside vanishes or explodes."""

LARGEST_STEP = 1.0
"""Largest relative step that leaves a layer what it was."""


@dataclass(frozen=True)
class LayerGradient:
    """One layer with weights, after one backward pass."""

    layer: str
    gradient_norm: float
    """L2 norm of dL/dW, over all the layer's weights."""
    weight_norm: float
    """L2 norm of W."""
    relative_step: float
    """lr |dL/dW| / |W|; 0 where W is 0."""
    firing_rate: float | None
    """Fraction of the maximum at which the neurons fire that the layer feeds; None where it feeds none directly."""


class GradientFlow:
    """Follows one forward and backward pass inside a `with` block; the network's gradients must be None or 0 before.

    Layers stand in the order of their first call. A layer feeds the neurons that are called next, if no other layer
    is called in between.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._monitor = SpikeMonitor(network)
        self._nodes = {id(node): name for name, node in spiking_nodes(network).items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: list[tuple[str, bool]] = []

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        self._calls = []
        for name, module in self._network.named_modules():
            if id(module) in self._nodes or _weights(module):
                self._handles.append(module.register_forward_pre_hook(self._hook(name, id(module) in self._nodes)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._monitor.__exit__(kind, error, traceback)

    def _hook(self, name: str, fires: bool) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._calls.append((name, fires))

        return record

    def layers(self, learning_rate: float, adaptive: bool = False) -> list[LayerGradient]:
        """One row for each layer whose weights have a gradient, in the order of first calls.

        Args:
            learning_rate: of the optimizer step whose size is asked for; times the factor of gradient clipping.
            adaptive: the optimizer is Adam, see `largest_relative_step`.
        """
        rates = {row["layer"]: row["rate"] for row in self._monitor.table()}
        feeds = self._neurons_fed()
        called = dict.fromkeys(name for name, fires in self._calls if not fires)
        modules = dict(self._network.named_modules())
        uncalled = {name: None for name, module in modules.items() if _weights(module) and name not in called}
        found = []
        for name in [*called, *uncalled]:
            norms = _norms(_weights(modules[name]))
            if norms is not None:
                gradient, weight = norms
                rate = rates.get(feeds.get(name, ""))
                length = _adam_norm(_weights(modules[name])) if adaptive else gradient
                found.append(LayerGradient(name, gradient, weight, _step(length, weight, learning_rate), rate))
        return found

    def _neurons_fed(self) -> dict[str, str]:
        """Layer -> the neurons that are called directly after its first call."""
        feeds: dict[str, str] = {}
        for (name, fires), (following, then_fires) in pairwise(self._calls):
            if then_fires and not fires:
                feeds.setdefault(name, following)
        return feeds


def judge(layers: Sequence[LayerGradient], trunk: tuple[str, ...] = ("",)) -> str | None:
    """Say why a network will hardly train, or None.

    Args:
        layers: of `GradientFlow.layers`.
        trunk: prefixes of the layers to compare, `ModelConfig.trunk`. Of these, the ones that feed neurons are
            compared with the last of them, from the last to the first, as the gradient passes; without neurons, all.
            Layers without a gradient that it passes by, as in blocks that start as the identity, are left out.
    """
    if bad := [row.layer for row in layers if not math.isfinite(row.gradient_norm)]:
        return f"the gradient is not finite at {bad[0]}"
    compared = _compared(layers, trunk)
    if not compared:
        return "no layer has a gradient"
    silent = list(takewhile(lambda row: row.gradient_norm == 0, compared))
    if silent:
        return f"vanishes at {silent[-1].layer}: its gradient is 0"
    passed = [row for row in compared if row.gradient_norm > 0]
    last = passed[-1]
    for row in reversed(passed):
        ratio = row.gradient_norm / last.gradient_norm
        if not TRAINABLE[0] <= ratio <= TRAINABLE[1]:
            what = "explodes" if ratio > 1 else "vanishes"
            return (
                f"{what} at {row.layer}: gradient norm {row.gradient_norm:.3g}, {ratio:.3g} times that of {last.layer}"
            )
    return None


def first_to_last(layers: Sequence[LayerGradient], trunk: tuple[str, ...] = ("",)) -> float:
    """Gradient norm of the first layer that `judge` compares over that of the last; 0 if the first has none."""
    compared = _compared(layers, trunk)
    if not compared or compared[0].gradient_norm == 0:
        return 0.0
    last = next(row for row in reversed(compared) if row.gradient_norm != 0)
    return compared[0].gradient_norm / last.gradient_norm


def _compared(layers: Sequence[LayerGradient], trunk: tuple[str, ...]) -> list[LayerGradient]:
    rows = [row for row in layers if row.layer.startswith(trunk)]
    return [row for row in rows if row.firing_rate is not None] or rows


@dataclass(frozen=True)
class StepSizes:
    """What tells which layer an optimizer step changes most; on the device until it is asked for."""

    layers: tuple[str, ...]
    numbers: Tensor
    """fp64 [2 N]: L2 norms of SGD's gradients, or for Adam, the numbers of weights that have one; norms of weights."""
    adaptive: bool

    def largest(self, learning_rate: float, numbers: Sequence[float]) -> tuple[str, float] | None:
        """The layer and its step relative to its weights; None without gradients.

        Args:
            learning_rate: of the step.
            numbers: on the host.
        """
        if not self.layers:
            return None
        gradients, weights = numbers[: len(self.layers)], numbers[len(self.layers) :]
        if self.adaptive:
            gradients = [math.sqrt(count) for count in gradients]
        steps = [_step(gradient, weight, learning_rate) for gradient, weight in zip(gradients, weights, strict=True)]
        largest = max(range(len(steps)), key=steps.__getitem__)
        return self.layers[largest], steps[largest]


def step_sizes(network: nn.Module, adaptive: bool = False) -> StepSizes:
    """Measure the step of each layer, for `StepSizes.largest`; one pass over weights and gradients.

    Args:
        network: with the gradients of the step.
        adaptive: as for `largest_relative_step`.
    """
    named = [(name, p, p.grad.detach()) for name, p in network.named_parameters() if p.ndim > 1 and p.grad is not None]
    if not named:
        return StepSizes((), torch.empty(0, dtype=torch.float64), adaptive)
    gradients = torch.stack([g.count_nonzero() if adaptive else g.norm() for _, _, g in named])
    weights = torch.stack([p.detach().norm() for _, p, _ in named])
    layers = tuple(name.rpartition(".")[0] for name, _, _ in named)
    return StepSizes(layers, torch.cat((gradients.double(), weights.double())), adaptive)


def largest_relative_step(network: nn.Module, learning_rate: float, adaptive: bool = False) -> tuple[str, float] | None:
    """Find the layer that the next optimizer step changes most, relative to its weights; None without gradients.

    Costs one pass over weights and gradients, and one copy to the host.

    Args:
        network: with the gradients of the step.
        learning_rate: of the step.
        adaptive: the optimizer is Adam, whose first step moves each weight that has a gradient by the learning rate,
            and whose later steps hardly exceed that; otherwise SGD, momentum left out.
    """
    sizes = step_sizes(network, adaptive)
    return sizes.largest(learning_rate, sizes.numbers.tolist())


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own weights: parameters with more than one dimension."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]


def _norms(weights: Iterable[nn.Parameter]) -> tuple[float, float] | None:
    trained = [(weight.grad, weight) for weight in weights if weight.grad is not None]
    if not trained:
        return None
    return _norm([gradient for gradient, _ in trained]), _norm([weight.detach() for _, weight in trained])


def _adam_norm(weights: Iterable[nn.Parameter]) -> float:
    """Length of Adam's first step over its learning rate: the sign of each gradient."""
    return math.sqrt(sum(int(weight.grad.count_nonzero()) for weight in weights if weight.grad is not None))


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def _step(gradient: float, weight: float, learning_rate: float) -> float:
    # Weights of 0, of a layer that is initialised so, move by any step.
    return learning_rate * gradient / weight if weight else 0.0
