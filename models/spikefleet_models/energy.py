"""Energy card of a network: multiplications, additions and estimated energy of each layer on real images.

    E_ANN = E_MAC * sum_l MAC_l                   MAC_l = O^2 C_in C_out k^2, each layer once
    E_SNN = E_AC * sum_l fr_l T D MAC_l           fr_l: mean of the binary spikes that layer l receives

Zhang et al., Front. Neurosci. 2023, eqs 18, 19; Luo et al., ECCV 2024, eqs 16, 17. An I-LIF integer n counts as n
spikes in D virtual steps, so fr * D is the mean integer. A layer on real values (the first one, whatever the images
hold, but for event frames that are declared binary; a classifier on averages; attention of the ASD) costs
multiplications. So does a layer on sums of spikes (behind SEW ResNet's ADD): no chip that adds up weights of single
spikes runs it, and the proof refuses it. Batch norm, additions, pooling, neuron updates and all memory traffic count as
free: published energies leave them out, so a card compares models, not chips.

A card states what it counted:

* form: `merged` (deployed: each RepConv chain one dense 3x3), `factored` (deployed, chains kept) or `as_built` (the
  network as given). SpikeYOLO's paper counts its own network merged and its ANN as built; the merged form runs
  spike-driven, since the inner layers of a chain see real values.
* precision: of the weights that spikes add up. Rounding them moves rates a little; what an addition costs then is for
  the constants to say (`int8-45nm`).
* shortcuts: whether the 1x1 convolutions of shortcuts count; the SG ResNet paper leaves them out.
* twin: the same topology as an ANN, every layer dense and once, in a form of its own; by default as built, because
  merging would only give an ANN more operations.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikefleet_models.energy_constants import EnergyConstants, energy_constants
from spikefleet_models.family import ModelConfig
from spikefleet_models.low_precision import Precision, rounded
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.operation_counts import LayerCount, OperationCounts, count_operations, on_meta
from spikefleet_models.reparam import deploy

Form = Literal["merged", "factored", "as_built"]

CARD_VERSION = 2
CONVENTIONS = (
    "the first layer multiplies, whatever the images hold, unless they are declared to be binary event frames",
    "an integer n from a neuron counts as n spikes in D virtual steps",
    "a layer that is fed by other integers, which are sums of spikes, multiplies",
    "additions are dense operations times the mean input of the layer",
    "batch norm, additions of feature maps, pooling, neuron updates and memory traffic are free",
)
"""Conventions of every card; each card lists them."""
FED_BY_INTEGERS = "fed by integers (sums of spikes), which no binary spikes carry: counted as MACs"
"""Remark of a row of such a layer."""
_READABLE = (1, CARD_VERSION)
"""Versions that are read. Version 1 counted layers on sums of spikes as additions."""
_DERIVED = ("version", "totals", "rows", "conventions")
_RENAMED = {"pictures": "images"}
"""Field names in cards of earlier releases -> field names today."""


@dataclass(frozen=True)
class TwinEnergy:
    """Operations of the ANN twin per image: each layer dense and once."""

    form: Form
    macs: float


@dataclass(frozen=True)
class EnergyCard:
    """Operations and energy of one image."""

    network: str
    """Name of the network's class."""
    form: Form
    shortcuts: bool
    """Whether 1x1 convolutions of shortcuts are counted."""
    image_size: tuple[int, int]
    """H, W of the first images."""
    timesteps: int
    """T of event frames, of the last ones where it varies; else that of the network."""
    bound: int
    """D: the largest integer that a neuron emits in a step; 0 without spiking neurons."""
    images: int
    """Number of measured images; 0 where the rates were given."""
    constants: EnergyConstants
    layers: tuple[LayerCount, ...]
    twin: TwinEnergy | None = None
    """None for ANNs and for networks whose configuration has no twin."""
    binary_input: bool = False
    """Whether the input was declared to be event frames of 0 and 1, which the first layer adds up."""
    precision: Precision = "fp32"
    """Of the weights of the layers that spikes feed."""

    @property
    def macs(self) -> float:
        """Multiply-accumulates on real values and on integers that are no neuron's own."""
        return math.fsum(layer.dense for layer in self.layers if not layer.spike_fed)

    @property
    def integer_macs(self) -> float:
        """Those of `macs` that are on integers: sums of spikes, of which SEW ResNet's ADD makes its layers' input."""
        return math.fsum(layer.dense for layer in self.layers if layer.integer_fed)

    @property
    def integer_fed(self) -> tuple[str, ...]:
        """Names of the layers on such integers."""
        return tuple(dict.fromkeys(layer.layer for layer in self.layers if layer.integer_fed))

    @property
    def acs(self) -> float:
        """Additions caused by spikes: dense operations times mean input."""
        return math.fsum(layer.accumulated or 0.0 for layer in self.layers)

    @property
    def synaptic_operations(self) -> float | None:
        """Spikes times the weights that each reaches; None where the rates were given."""
        if not self.images:
            return None
        return math.fsum(layer.synaptic_operations or 0.0 for layer in self.layers)

    @property
    def dense(self) -> float:
        """Operations of all layers and steps, as if every input were dense."""
        return math.fsum(layer.dense for layer in self.layers)

    @property
    def mean_input(self) -> float | None:
        """Mean integer input of the layers that spikes feed, weighted by their operations; None without such layers."""
        dense = math.fsum(layer.dense for layer in self.layers if layer.spike_fed)
        return self.acs / dense if dense else None

    @property
    def energy_mj(self) -> float:
        """Energy in mJ."""
        return _millijoules(self.constants, self.macs, self.acs)

    @property
    def twin_energy_mj(self) -> float | None:
        """Energy of the ANN twin in mJ, with the same constants."""
        return None if self.twin is None else _millijoules(self.constants, self.twin.macs, 0.0)

    @property
    def twin_ratio(self) -> float | None:
        """Energy of the ANN twin divided by the network's."""
        twin = self.twin_energy_mj
        return None if twin is None or not self.energy_mj else twin / self.energy_mj

    def under(self, constants: str | EnergyConstants) -> "EnergyCard":
        """Return the same counts with other constants.

        Raises:
            ValueError: the name is unknown.
        """
        return replace(self, constants=energy_constants(constants))

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, in the order in which they run, for tables and plots."""
        total = self.energy_mj
        rows = []
        for layer in self.layers:
            macs, acs = (0.0, layer.accumulated or 0.0) if layer.spike_fed else (layer.dense, 0.0)
            energy = _millijoules(self.constants, macs, acs)
            mean_input = acs / layer.dense if layer.spike_fed and layer.dense else None
            rows.append(
                {
                    "layer": layer.layer,
                    "operation": layer.operation,
                    "input": "spikes" if layer.spike_fed else "integers" if layer.integer_fed else "real",
                    "bound": layer.bound,
                    "dense": layer.dense,
                    "mean_input": mean_input,
                    "rate": None if mean_input is None else mean_input / layer.bound,
                    "macs": macs,
                    "acs": acs,
                    "synaptic_operations": layer.synaptic_operations,
                    "energy_mj": energy,
                    "share": energy / total if total else 0.0,
                    "remark": FED_BY_INTEGERS if layer.integer_fed else "",
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the counts, and under `totals` and `rows` what is computed from them."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain |= {"version": CARD_VERSION, "image_size": list(self.image_size), "constants": asdict(self.constants)}
        plain["layers"] = [asdict(layer) for layer in self.layers]
        plain["twin"] = None if self.twin is None else asdict(self.twin)
        names = (
            "energy_mj",
            "macs",
            "integer_macs",
            "acs",
            "synaptic_operations",
            "dense",
            "mean_input",
            "twin_energy_mj",
            "twin_ratio",
        )
        plain["totals"] = {name: getattr(self, name) for name in names}
        plain["rows"] = self.rows()
        plain["conventions"] = list(CONVENTIONS)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Read a card that `to_dict` wrote, of this release or an earlier one.

        Counts of earlier releases stay, but layers on sums of spikes become MACs, so that totals can be compared.

        Raises:
            ValueError: another version, or fields that are not a card's.
        """
        if plain.get("version") not in _READABLE:
            raise ValueError(
                f"energy card: version is {plain.get('version')}, expected one of {', '.join(map(str, _READABLE))}; "
                "measure the card again"
            )
        known = {_RENAMED.get(name, name): value for name, value in plain.items() if name not in _DERIVED}
        try:
            known["image_size"] = (int(known["image_size"][0]), int(known["image_size"][1]))
            known["constants"] = EnergyConstants(**known["constants"])
            layers = tuple(LayerCount(**layer) for layer in known["layers"])
            if plain["version"] == 1:
                layers = tuple(_with_integers_marked(layer, known["bound"]) for layer in layers)
            known["layers"] = layers
            known["twin"] = None if known["twin"] is None else TwinEnergy(**known["twin"])
            return cls(**known)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"energy card: the fields are damaged ({error}); measure the card again") from error


def energy_card(
    network: nn.Module,
    batches: Iterable[Tensor],
    constants: str | EnergyConstants = "int32-45nm",
    form: Form = "merged",
    shortcuts: bool = True,
    twin_form: Form | None = "as_built",
    binary_input: bool = False,
    precision: Precision = "fp32",
) -> EnergyCard:
    """Measure the card of a network in eval mode; the batch size changes nothing but rounding.

    Args:
        network: a trained network of this package; not changed. One without batch norms (already deployed) counts as
            built.
        batches: images [B, C, H, W] or frames [T, B, C, H, W], of the network's type and on its device.
        constants: a name in `energy_constants.CONSTANTS`, or your own constants.
        form: form to count; see the module docstring.
        shortcuts: count the 1x1 convolutions of shortcuts.
        twin_form: form of the ANN twin; None leaves the twin out.
        binary_input: whether batches are event frames of 0 and 1: then the first layer adds up weights (AC) too.
        precision: of the weights of the layers that spikes feed, of a network that is merged or factored.

    Raises:
        ValueError: the constants are unknown, there are no images, `reparam.deploy` cannot fold a batch norm, or
            `binary_input` and frames hold something else than 0 and 1; or spikes feed no layer that could be rounded,
            or its batch norms are not folded.
    """
    chosen = energy_constants(constants)
    form, counted = _in_form(network, form)
    if precision != "fp32":
        if any(isinstance(module, _BatchNorm) for module in counted.modules()):
            raise ValueError(f"precision={precision!r} rounds folded weights; set form='merged' or 'factored'")
        counted = rounded(counted, precision)
    sizes: Counter[tuple[int, int]] = Counter()
    steps: int = getattr(network, "timesteps", 1)

    def seen() -> Iterable[Tensor]:
        nonlocal steps
        for images in batches:
            sizes[(images.shape[-2], images.shape[-1])] += images.shape[-4]
            steps = images.shape[0] if images.ndim == 5 else steps
            yield images

    counts = count_operations(counted, seen(), binary_input=binary_input)
    card = _card(network, counts, chosen, form, shortcuts, twin_form, sizes, counts.images, steps, binary_input)
    return replace(card, precision=precision)


def energy_at_rates(
    network: nn.Module,
    image_size: tuple[int, int],
    rates: float | Mapping[str, float],
    constants: str | EnergyConstants = "int32-45nm",
    form: Form = "merged",
    shortcuts: bool = True,
    twin_form: Form | None = "as_built",
    timesteps: int | None = None,
    binary_input: bool = False,
) -> EnergyCard:
    """Compute the card of a network from given rates, without running it; trained weights are not needed.

    Args:
        network: any network of this package; may be on the meta device.
        image_size: H, W of a static image, or of event frames.
        rates: mean input of all layers that spikes feed, or of each by its name: a mean integer, so up to D for I-LIF.
        constants: as for `energy_card`.
        form: as for `energy_card`.
        shortcuts: as for `energy_card`.
        twin_form: as for `energy_card`.
        timesteps: T of event frames; None for a static image, which the first layer sees once.
        binary_input: as for `energy_card`; `rates` then name the first layer too.

    Raises:
        ValueError: a layer that spikes feed has no rate, a rate has no such layer, the constants are unknown, or
            `reparam.deploy` cannot fold a batch norm.
    """
    chosen = energy_constants(constants)
    form, counted = _in_form(on_meta(network), form)
    counts = _count_without_images(counted, image_size, timesteps, binary_input)
    names = {layer.layer for layer in counts.layers if layer.spike_fed}
    if isinstance(rates, Mapping):
        missing, unknown = sorted(names - rates.keys()), sorted(rates.keys() - names)
        if missing or unknown:
            integers = {layer.layer for layer in counts.layers if layer.integer_fed}
            wrong = [
                *(f"{name} is {'fed by sums of' if name in integers else 'not fed by'} spikes" for name in unknown),
                *(f"no rate for {name}" for name in missing),
            ]
            raise ValueError(f"rates: the names do not fit the network: {'; '.join(wrong[:5])}")
        given = rates
    else:
        given = dict.fromkeys(names, rates)
    layers = tuple(
        replace(layer, accumulated=layer.dense * given[layer.layer]) if layer.spike_fed else layer
        for layer in counts.layers
    )
    counts = replace(counts, layers=layers)
    steps: int = getattr(network, "timesteps", 1) if timesteps is None else timesteps
    return _card(network, counts, chosen, form, shortcuts, twin_form, {image_size: 1}, 0, steps, binary_input)


def _with_integers_marked(layer: LayerCount, largest_spike: int) -> LayerCount:
    """A count of version 1, which took sums of spikes for spikes: they hold more than any neuron emits."""
    if not layer.spike_fed or layer.bound <= largest_spike:
        return layer
    return replace(layer, spike_fed=False, integer_fed=True, accumulated=None, synaptic_operations=None)


def _millijoules(constants: EnergyConstants, macs: float, acs: float) -> float:
    return (macs * constants.mac_pj + acs * constants.ac_pj) / 1e9


def _in_form(network: nn.Module, form: Form) -> tuple[Form, nn.Module]:
    """Return a copy in eval mode and the form that it really has."""
    folded = not any(isinstance(module, _BatchNorm) for module in network.modules())
    if form == "as_built" or folded:
        return "as_built", copy.deepcopy(network).eval()
    return form, deploy(network, merge=form == "merged")


def _count_without_images(
    network: nn.Module, image_size: tuple[int, int], timesteps: int | None = None, binary_input: bool = False
) -> OperationCounts:
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if channels is None:
        raise ValueError(
            "the network has no config.in_channels, so its input shape is unknown; measure it with energy_card instead"
        )
    dtype = next(network.parameters()).dtype
    leading = (1,) if timesteps is None else (timesteps, 1)
    image = torch.empty((*leading, channels, *image_size), dtype=dtype, device="meta")
    return count_operations(network, [image], measure=False, binary_input=binary_input)


def _card(
    network: nn.Module,
    counts: OperationCounts,
    constants: EnergyConstants,
    form: Form,
    shortcuts: bool,
    twin_form: Form | None,
    sizes: Mapping[tuple[int, int], int],
    images: int,
    timesteps: int,
    binary_input: bool,
) -> EnergyCard:
    """Build the card from counts; `sizes` maps (H, W) to the number of images, on which the twin is counted too.

    Of event frames the twin sees one, as their sum would be.
    """
    nodes = spiking_nodes(network)
    twin = None
    config = getattr(network, "config", None)
    ann_config = config.twin() if isinstance(config, ModelConfig) else None
    if nodes and twin_form is not None and ann_config is not None:
        with torch.device("meta"):
            ann = ann_config.build()
        twin_form, counted = _in_form(ann, twin_form)
        dense = 0.0
        for size, share in sizes.items():
            layers = _chosen(ann, _count_without_images(counted, size).layers, shortcuts)
            dense += math.fsum(layer.dense for layer in layers) * share / sum(sizes.values())
        twin = TwinEnergy(twin_form, dense)
    return EnergyCard(
        network=type(network).__name__,
        form=form,
        shortcuts=shortcuts,
        image_size=next(iter(sizes)),
        timesteps=timesteps,
        bound=max((node.bound for node in nodes.values()), default=0),
        images=images,
        constants=constants,
        layers=_chosen(network, counts.layers, shortcuts),
        twin=twin,
        binary_input=binary_input,
    )


def _chosen(network: nn.Module, layers: tuple[LayerCount, ...], shortcuts: bool) -> tuple[LayerCount, ...]:
    if shortcuts:
        return layers
    left_out = tuple(f"{n}." for n, module in network.named_modules() if getattr(module, "is_shortcut", False))
    return tuple(layer for layer in layers if not layer.layer.startswith(left_out))
