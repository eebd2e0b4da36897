"""Initial weights of a spiking network from an ANN twin, or from the same network with another D.

Inputs of neurons are scaled to their thresholds: an ANN's activations have no bound, and a neuron emits at most its
capacity, 1 in a step at a current of V_th, or D. Rueckauer, Lungu, Hu, Pfeiffer and Liu, "Conversion of
continuous-valued deep networks to efficient event-driven networks for image classification", Front. Neurosci. 2017:
each layer is divided by a high percentile of its activations, which a few images show. Deviations:

* Batch norm is kept, not folded: gamma and beta before a neuron are scaled, so that the percentile reaches the neuron's
  capacity. What that does to the inputs of the next layer, its batch norm takes out again: the running statistics are
  measured anew with the spiking network itself.
* One factor for each layer. Between two spiking networks it is the ratio of their capacities, which only D and V_th
  change; T does not, since a rate has no T in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from spikefleet.errors import UserError
from spikefleet_models.neurons import ILIF
from spikefleet_models.spiking_unit import SpikingUnit
from spikefleet_pipelines.loading import Batch

BatchNorms = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Scaled:
    """What was done to the batch norms before neurons."""

    factors: dict[str, float]
    """Of gamma and beta, by the unit's name."""
    batches: int
    """Of training images that were measured."""
    images: int
    percentile: float | None
    """Of the ANN's activations; None between spiking networks."""

    def sentence(self) -> str:
        """What was done, for the user."""
        low, high = min(self.factors.values()), max(self.factors.values())
        how = "ratio of thresholds" if self.percentile is None else f"percentile {self.percentile:g} of activations"
        return (
            f"batch norms before {len(self.factors)} layers of neurons scaled by {low:.3g} to {high:.3g} ({how}); "
            f"statistics measured anew on {self.images:,} training images"
        )


def scale_to_thresholds(network: nn.Module, source: nn.Module, batches: Sequence[Batch], percentile: float) -> Scaled:
    """Scales the batch norms before neurons in place, and measures all running statistics anew.

    Args:
        network: spiking, with the weights of the source.
        source: the ANN, or the spiking network, that the weights are from.
        batches: of training images.
        percentile: of an ANN's activations that reaches the capacity of a neuron, 0 to 100.

    Raises:
        UserError: the network has no batch norm directly before its neurons, or an activation of the ANN is never
            positive.
    """
    units = {name: unit for name, unit in network.named_modules() if _has_neuron(unit)}
    if not units:
        raise UserError(
            "init.scale_thresholds needs batch norms directly before neurons, which this network does not have; "
            "leave it out: its weights are taken as they are"
        )
    spiking = any(_has_neuron(module) for module in source.modules())
    if spiking:
        theirs = dict(source.named_modules())
        factors = {
            name: capacity(unit) / capacity(other)
            for name, unit in units.items()
            if _has_neuron(other := theirs.get(name))
        }
    else:
        factors = {
            name: capacity(units[name]) / reached
            for name, reached in _percentiles(source, units, batches, percentile).items()
        }
    with torch.no_grad():
        for name, factor in factors.items():
            bn = units[name].bn
            assert isinstance(bn, BatchNorms), "`_has_neuron` says so"
            bn.weight.mul_(factor)
            bn.bias.mul_(factor)
    measure_statistics(network, batches)
    return Scaled(factors, len(batches), sum(len(one.indices) for one in batches), None if spiking else percentile)


def capacity(unit: SpikingUnit) -> float:
    """The current at which a neuron emits as much as it can in a step: V_th, or D over the input's factor."""
    neuron = unit.neuron
    if isinstance(neuron, ILIF):
        return neuron.bound / neuron.input_scale
    assert not isinstance(neuron, nn.ReLU)
    return float(neuron.v_threshold)


def measure_statistics(network: nn.Module, batches: Sequence[Batch]) -> None:
    """Sets the running statistics of all batch norms to their mean over batches of images."""
    norms = [module for module in network.modules() if isinstance(module, BatchNorms)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch.network_input)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _has_neuron(module: nn.Module | None) -> TypeGuard[SpikingUnit]:
    return (
        isinstance(module, SpikingUnit) and not isinstance(module.neuron, nn.ReLU) and isinstance(module.bn, BatchNorms)
    )


def _percentiles(
    source: nn.Module, units: Mapping[str, SpikingUnit], batches: Sequence[Batch], percentile: float
) -> dict[str, float]:
    """The percentile of an ANN's activations where the spiking network has neurons; the mean over batches.

    Raises:
        UserError: it is not positive for a layer.
    """
    found: dict[str, list[float]] = {}
    source.eval()

    def take(name: str, values: Tensor) -> None:
        found.setdefault(name, []).append(_quantile(values, percentile))

    with _observed(source, units, take), torch.no_grad():
        for batch in batches:
            source(batch.network_input)
    reached = {name: sum(values) / len(values) for name, values in found.items()}
    for name, value in reached.items():
        if value <= 0:
            raise UserError(
                f"init.scale_thresholds={percentile:g}: this percentile of the activations of {name} is {value:.3g}, "
                "so that it cannot reach a threshold; set a larger one"
            )
    return reached


@contextmanager
def _observed(
    source: nn.Module, units: Mapping[str, SpikingUnit], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls `take` with a neuron's current: what batch norm returns, with the shortcut where that is a current too."""
    handles = []
    for name, module in source.named_modules():
        if name not in units:
            continue
        if isinstance(module, SpikingUnit) and units[name].post_add:
            handles.append(module.neuron.register_forward_pre_hook(lambda _, given, name=name: take(name, given[0])))
        else:  # a shortcut that is added before the activation has a batch norm alone
            norm = module.bn if isinstance(module, SpikingUnit) else module
            handles.append(norm.register_forward_hook(lambda _, given, out, name=name: take(name, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantile(values: Tensor, percentile: float) -> float:
    """The percentile of positive parts; `torch.quantile` takes no more than 16 million values."""
    flat = values.flatten().clamp_min(0).float()
    return float(flat.kthvalue(max(1, round(percentile / 100 * len(flat)))).values)
