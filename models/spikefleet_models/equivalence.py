"""Proof that integer training equals binary inference: both forms of a network, layer by layer, with torch.equal.

Sums over D slots come in another order than sums over integers, and floating point is exact in every order only where
nothing is rounded. So the proof runs in fp64 on a network whose spike-fed layers have weights and biases on a grid:
multiples of a power of two, at most 2^30 of them to the layer's largest weight. Every partial sum, in any order, is
then a whole number of steps of the grid, and up to 2^53 steps fp64 holds it exactly:

    |b| + max |w| * D * fan-in  <=  2^53 steps of the grid

(for convolutions that multiply and add, as fp64's do on a CPU; not for those by FFT or Winograd's algorithm).
`headroom_bits` is what is left of the 53 bits. Moving the weights to the grid changes each by at most 2^-31 of the
layer's largest; the proof is about the wiring (slots, order in time, biases), which does not depend on it. What
rounding does to the weights as they are, in the types that people run, is `count_flips`.

Neurons with D = 1 are the same in both forms, so for them the comparison shows little. What is proved there is that
spikes are used as binary events (`spike_edges.py`) and step by step (`causality.py`).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.causality import acausal_neuron
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.slots import Layer, NotSpikeDrivenError
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import LayerInput, SpikeFed, check_finite, layer_inputs

WEIGHT_BITS = 30
EXACT_BITS = 53
"""Integers up to 2^53 are exact in fp64."""


@dataclass(frozen=True)
class LayerProof:
    """One layer of both forms. A layer that runs more than once (a head shared by pyramid levels) is one row."""

    name: str
    kind: Literal["neuron", "spike-fed", "analogue"]
    timesteps: int | None
    """T; None for analogue layers, like the fields below."""
    bound: int | None
    """D: slots of a step."""
    equal: bool
    """Outputs of both forms are equal to the last bit: currents of a layer, emitted integers of a neuron."""
    max_difference: float
    binary: bool | None
    """The binary form held nothing but 0 and 1 here (a neuron's output, a layer's input), and the integer form
    nothing but integers in [0, D]."""
    ones: float | None
    """Share of ones in those slots."""
    headroom_bits: int | None
    """Unused bits of fp64's 53 in the largest sum; None for neurons too."""
    reason: str | None
    """Why an analogue layer is not spike-driven."""


@dataclass(frozen=True)
class EquivalenceProof:
    """What `check_equivalence` found. Differences are infinite where shapes differ."""

    layers: tuple[LayerProof, ...]
    outputs_equal: bool
    max_output_difference: float
    images: int
    failure: str | None = None
    """What kept the comparison from being made, or made it worthless."""

    @property
    def passed(self) -> bool:
        """Everything was compared, everything is equal, and all that should be spikes is 0 or 1."""
        return self.failure is None and self.outputs_equal and not self.unequal

    @property
    def unequal(self) -> tuple[str, ...]:
        """Layers that differ or that held something else than spikes, in network order."""
        return tuple(layer.name for layer in self.layers if not layer.equal or layer.binary is False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON but for infinite differences, which become None."""
        plain = {"passed": self.passed, "unequal": list(self.unequal), **asdict(self)}
        for row in (plain, *plain["layers"]):
            for key in ("max_difference", "max_output_difference"):
                if not math.isfinite(row.get(key, 0.0)):
                    row[key] = None
        plain["layers"] = list(plain["layers"])
        return plain


@dataclass(frozen=True)
class LayerFlips:
    """Integers of one neuron layer that differ between both forms."""

    name: str
    flipped: int
    emitted: int
    """Integers compared, zeros among them."""


@dataclass(frozen=True)
class FlipCount:
    """What rounding does: both forms in one floating-point type, without the grid."""

    dtype: str
    layers: tuple[LayerFlips, ...]
    max_output_difference: float

    @property
    def flipped(self) -> int:
        """Integers of the network that differ."""
        return sum(layer.flipped for layer in self.layers)

    @property
    def emitted(self) -> int:
        """Integers of the network that were compared."""
        return sum(layer.emitted for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        plain = {"flipped": self.flipped, "emitted": self.emitted, **asdict(self)}
        plain["layers"] = list(plain["layers"])
        return plain


def on_grid(deployed: nn.Module, inputs: Mapping[str, LayerInput] | None = None) -> tuple[nn.Module, dict[str, int]]:
    """An fp64 copy whose spike-fed layers sum without rounding in every order, and the headroom of each in bits.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        inputs: `layer_inputs(deployed, images)`; found with a noise image when left out.

    Raises:
        NotSpikeDrivenError: a layer needs more than 53 bits; or as `layer_inputs`.
    """
    network = copy.deepcopy(deployed).eval().double()
    return network, _put_on_grid(network, layer_inputs(network) if inputs is None else inputs)


def _put_on_grid(network: nn.Module, inputs: Mapping[str, LayerInput]) -> dict[str, int]:
    """Move the weights of an fp64 network; return the headroom of each spike-fed layer."""
    headroom = {}
    for name, source in inputs.items():
        if isinstance(source, SpikeFed):
            layer = network.get_submodule(name)
            assert isinstance(layer, Layer)
            headroom[name] = _to_grid(layer, source.bound)
            if headroom[name] < 0:
                raise NotSpikeDrivenError(
                    f"layer {name} needs {EXACT_BITS - headroom[name]} bits to sum exactly, but fp64 has {EXACT_BITS}: "
                    "its bias is too large beside its weights"
                )
    return headroom


@torch.no_grad()
def _to_grid(layer: Layer, bound: int) -> int:
    weight, bias = layer.weight, layer.bias
    largest = weight.abs().max().item()
    # frexp: largest < 2^exponent, so that it is below 2^WEIGHT_BITS steps.
    step = 2.0 ** (math.frexp(largest)[1] - WEIGHT_BITS) if largest else 2.0**-WEIGHT_BITS
    weight.copy_((weight / step).round() * step)
    fan_in = weight[0].numel()
    most = int(weight.abs().max().item() / step) * bound * fan_in
    if bias is not None:
        bias.copy_((bias / step).round() * step)
        most += int(bias.abs().max().item() / step)
    return EXACT_BITS - most.bit_length()


def check_equivalence(deployed: nn.Module, images: Tensor) -> EquivalenceProof:
    """Run the integer and the binary form in fp64, one image at a time, and compare every layer.

    Args:
        deployed: a network after `reparam.deploy`, of any floating-point type; not changed.
        images: images [B, C, H, W] or frames [T, B, C, H, W]. Memory is that of one image.

    Raises:
        NotSpikeDrivenError: the network has no spike-driven form, see `spike_edges.py`; a weight, bias or statistic is
            not finite; or as `on_grid`.
        ValueError: there are no images, or they hold NaN or infinity.
    """
    samples = _one_by_one(images.double())
    check_finite(deployed)
    integer = copy.deepcopy(deployed).eval().double()
    inputs = layer_inputs(integer, images.double())
    headroom = _put_on_grid(integer, inputs)
    acausal = acausal_neuron(integer, samples[0])
    comparison = _Comparison(integer, spike_driven(integer, inputs), inputs)
    for sample in samples:
        comparison.run(sample)
    return comparison.proof(headroom, len(samples), acausal)


def count_flips(deployed: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> FlipCount:
    """Run both forms in `dtype` on the weights as they are, and count emitted integers that differ.

    A rounding error of a current flips an integer where the membrane is within that error of x.5. Layers of the
    binary form sum in at least fp32.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        images: as for `check_equivalence`.
        dtype: float32, bfloat16 or float16.

    Raises:
        NotSpikeDrivenError: the forms cannot be compared, or as `layer_inputs`.
        ValueError: there are no images, or they hold NaN or infinity.
    """
    check_finite(deployed)
    integer = copy.deepcopy(deployed).eval().to(dtype)
    for module in integer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # as under autocast, where one is left
    samples = _one_by_one(images.to(dtype))
    inputs = layer_inputs(integer, samples[0])
    comparison = _Comparison(integer, spike_driven(integer, inputs), inputs)
    for sample in samples:
        comparison.run(sample)
    if comparison.failure is not None:
        raise NotSpikeDrivenError(comparison.failure)
    layers = [LayerFlips(n, tally.unequal, tally.elements) for n, tally in comparison.tallies.items() if tally.node]
    return FlipCount(str(dtype).removeprefix("torch."), tuple(layers), comparison.output_difference)


def _one_by_one(images: Tensor) -> list[Tensor]:
    if not images.numel():
        raise ValueError(f"images has shape {tuple(images.shape)}; give at least one image")
    if not images.isfinite().all():
        raise ValueError("images holds NaN or infinity; give finite values")
    return list(images.split(1, dim=images.ndim - 4))


@dataclass
class _Tally:
    """Sums over the calls of one layer on all images."""

    node: bool
    elements: int = 0
    unequal: int = 0
    difference: float = 0.0
    binary: bool = True
    slots: int = 0
    ones: float = 0.0

    def compare(self, expected: Tensor, found: Tensor) -> None:
        self.elements += expected.numel()
        if expected.shape != found.shape:
            self.unequal += expected.numel()
            self.difference = math.inf
        elif not torch.equal(expected, found):
            # NaN differs from everything, itself too.
            self.unequal += int((expected != found).sum())
            gap = (expected.double() - found.double()).abs().nan_to_num(math.inf, math.inf)
            self.difference = max(self.difference, gap.max().item())

    def count_slots(self, spikes: Tensor) -> None:
        self.binary &= bool(((spikes == 0) | (spikes == 1)).all())
        self.slots += spikes.numel()
        self.ones += spikes.sum(dtype=torch.float64).item()

    def check_integers(self, counts: Tensor, bound: int) -> None:
        self.binary &= bool(((counts >= 0) & (counts <= bound) & (counts == counts.round())).all())


@dataclass
class _Comparison:
    """Both forms on the same images. The integer form's tensors are kept until the binary form's meet them."""

    integer: nn.Module
    binary: nn.Module
    inputs: Mapping[str, LayerInput]
    tallies: dict[str, _Tally] = field(default_factory=dict)
    output_difference: float = 0.0
    failure: str | None = None

    def __post_init__(self) -> None:
        self._bounds = {name: node.bound for name, node in spiking_nodes(self.integer).items()}
        self._steps: dict[str, int] = {}

    @torch.no_grad()
    def run(self, sample: Tensor) -> None:
        kept: dict[str, list[Tensor]] = {}

        def keep(name: str, given: Tensor, output: Tensor) -> None:
            tally = self.tallies.setdefault(name, _Tally(node=name in self._bounds))
            source = self.inputs.get(name)
            if tally.node:
                self._steps[name] = output.shape[0]
                tally.check_integers(output, self._bounds[name])
                # A byte each: values are 0..255 or the check above has failed.
                kept.setdefault(name, []).append(output.to(torch.uint8))
                return
            if isinstance(source, SpikeFed):
                tally.check_integers(given, source.bound)
            # A copy: an in-place ReLU may come next.
            kept.setdefault(name, []).append(output.clone())

        def compare(name: str, given: Tensor, output: Tensor) -> None:
            tally, waiting = self.tallies.get(name), kept.get(name)
            if tally is None or not waiting:
                self.failure = f"layer {name} runs more often in the binary form than in the integer form"
                return
            if tally.node:
                tally.count_slots(output)
                output = self._counts(name, output)
            elif isinstance(self.inputs.get(name), SpikeFed):
                tally.count_slots(given)
            other = waiting.pop(0)
            tally.compare(other, output)
            if other.shape != output.shape:
                # Whatever comes next fails somehow, by torch's errors too.
                raise NotSpikeDrivenError(f"{name} gives {tuple(output.shape)} for {tuple(other.shape)}")

        expected = self._forward(self.integer, sample, keep)
        try:
            found = self._forward(self.binary, sample, compare)
        except NotSpikeDrivenError as error:  # what torch or the machine raises is no finding
            self.failure, self.output_difference = f"the binary form does not run: {error}", math.inf
            return
        if any(kept.values()):
            name = next(name for name, waiting in kept.items() if waiting)
            self.failure = f"layer {name} runs more often in the integer form than in the binary form"
        if len(expected) != len(found):
            self.failure = f"the integer form has {len(expected)} outputs, the binary form {len(found)}"
            self.output_difference = math.inf
            return
        outputs = _Tally(node=False)
        for one, other in zip(expected, found, strict=True):
            outputs.compare(one, other)
        self.output_difference = max(self.output_difference, outputs.difference)

    def _counts(self, name: str, spikes: Tensor) -> Tensor:
        """Slots [T * D, ...] -> integers [T, ...], as bytes; what has another leading axis comes back as it is."""
        T = self._steps[name]
        if spikes.shape[0] != T * self._bounds[name]:
            return spikes
        return spikes.unflatten(0, (T, -1)).sum(1).to(torch.uint8)

    def _forward(
        self, network: nn.Module, sample: Tensor, record: Callable[[str, Tensor, Tensor], None]
    ) -> tuple[Tensor, ...]:
        with _recording(network, [*self._bounds, *self.inputs], record):
            outputs = network(sample.clone())
        return tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))

    def proof(self, headroom: Mapping[str, int], images: int, acausal: str | None) -> EquivalenceProof:
        rows = []
        for name, tally in self.tallies.items():
            source = self.inputs.get(name)
            steps, bound = self._steps.get(name), self._bounds.get(name)
            if isinstance(source, SpikeFed):
                steps, bound = source.timesteps, source.bound
            spiking = bound is not None
            rows.append(
                LayerProof(
                    name=name,
                    kind="neuron" if tally.node else "spike-fed" if spiking else "analogue",
                    timesteps=steps,
                    bound=bound,
                    equal=not tally.unequal,
                    max_difference=tally.difference,
                    binary=tally.binary if spiking else None,
                    ones=tally.ones / max(tally.slots, 1) if spiking else None,
                    headroom_bits=headroom.get(name),
                    reason=None if source is None or isinstance(source, SpikeFed) else source.reason,
                )
            )
        failure = self.failure or acausal
        if failure is None and not any(row.ones for row in rows if row.kind == "spike-fed"):
            failure = "no layer received a single spike on these images, so nothing was shown"
        difference = self.output_difference
        return EquivalenceProof(tuple(rows), difference == 0.0, difference, images, failure)


@contextmanager
def _recording(network: nn.Module, names: list[str], record: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `record(name, input, output)` after each call of the named modules."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: record(name, tree_leaves((args, kwargs))[0], output)

    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            handle = network.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
