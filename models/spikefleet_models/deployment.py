"""Whether a deployed network computes what the trained one does: both in fp64, between one neuron and the next.

The deployed network's neurons are made to take and to emit what the trained network's neurons took and emitted (teacher
forcing). So each current is compared on equal spikes, and a rounding error at x.5 cannot reach the layers behind it.
Neurons must answer equal currents with equal integers, to the last bit.

Currents may differ by what rounding explains. A sum of n products, in any order, with or without fused multiply-adds,
errs by at most n u (|w| |x| + |b|) to first order, u = 2^-53 (Higham, Accuracy and Stability of Numerical Algorithms,
2002, section 3.1), and so does a batch norm, as a sum of |scale| |x|, |scale| |mean| and |shift|. Errors of earlier
layers pass a layer with |w| and a batch norm with |scale|. With S the sum of these terms over all layers and batch
norms on the way from the last neurons,

    |deployed - trained|  <=  gamma (S + |trained|)        gamma = (3 N + 64) u + v

where N is the largest fan-in of both networks: N for each forward pass, N for the sums over a chain's middle channels
in folding, 64 for batch norms, additions on the way and the folding of a chain; v is the spacing at 1 of the type that
the deployed weights are in (0 for fp64, 2^-23 for fp32), to which each was rounded, a chain's twice.

S is found by a second pass of the trained network with gaps: a layer's output is moved up by 2^-20 of its term. Between
neurons, where only sums and selections follow, this is S itself. Behind the last neuron, and on branches of the image,
anything may follow; there it is the first-order response, for outputs the largest of a tensor and of five drawn signs.

Where no spike comes on these images, be it to one channel, weights have no say. So both networks are compared once more
on drawn spikes in the place of what the neurons emit, and once on their complement: then every neuron fires.

An integer that differs on the deployed network's own current has a membrane within that error of a threshold, since the
neuron is the same and its current within tolerance. Such integers are counted.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from spikefleet_models.layer_blame import output_name, suspects
from spikefleet_models.neurons import SpikingNode, spiking_nodes
from spikefleet_models.reparam import affine
from spikefleet_models.slots import Layer, drawn_integers

_GAP = 2.0**-20
_DRAWS = 4
_RATE = 0.25
"""Of drawn spikes: few enough for max-pools and gates to let differences pass."""


@dataclass(frozen=True)
class SegmentProof:
    """The current of one neuron, or the outputs: what the deployed network computes from the neurons before."""

    name: str
    """Of the neuron; `output 0` for the first output."""
    equal: bool
    """Every value is within its tolerance, and the neuron answers equal currents with equal integers."""
    max_difference: float
    of_tolerance: float
    """Largest difference in units of the tolerance of its value; above 1 rounding does not explain it."""
    same_neuron: bool
    """The neuron answers equal currents with equal integers."""
    flipped: int
    """Integers that differ on the deployed network's own currents."""
    emitted: int
    """Integers compared."""
    layers: tuple[str, ...] = ()
    """Where it differs: layers that it is made of and that no equal segment is made of."""


@dataclass(frozen=True)
class DeploymentProof:
    """Trained network against its deployed form."""

    segments: tuple[SegmentProof, ...]
    relative_tolerance: float
    """gamma of the module's docstring."""
    images: int
    failure: str | None = None
    """Why the networks could not be compared to the end."""

    @property
    def passed(self) -> bool:
        """Everything was compared, and nothing differs by more than rounding explains."""
        return self.failure is None and not self.differing

    @property
    def differing(self) -> tuple[SegmentProof, ...]:
        """Segments that differ, in network order."""
        return tuple(segment for segment in self.segments if not segment.equal)

    @property
    def max_difference(self) -> float:
        """Largest difference of a current or an output."""
        return max((segment.max_difference for segment in self.segments), default=0.0)

    @property
    def flipped(self) -> int:
        """Integers that rounding flips."""
        return sum(segment.flipped for segment in self.segments)

    @property
    def emitted(self) -> int:
        """Integers compared."""
        return sum(segment.emitted for segment in self.segments)

    @property
    def why(self) -> str | None:
        """What differs first, in words; None if nothing does."""
        if self.failure is not None or not self.differing:
            return self.failure
        first = self.differing[0]
        of = f"the current of neuron {first.name}" if first.emitted else first.name
        if first.of_tolerance <= 1:
            return f"neuron {first.name} answers the trained network's currents with other integers"
        layers = f", computed by {', '.join(first.layers)}," if first.layers else ""
        return (
            f"{of}{layers} differs from the trained network's by {first.max_difference:.3g}, which is "
            f"{first.of_tolerance:.3g} times what rounding explains"
        )


@dataclass
class _Segment:
    difference: float = 0.0
    of_tolerance: float = 0.0
    same_neuron: bool = True
    flipped: int = 0
    emitted: int = 0

    def compare(self, trained: Tensor, found: Tensor, tolerance: Tensor) -> None:
        if not found.numel():
            return
        gap = (trained - found).abs().nan_to_num(math.inf, math.inf)
        gap[trained == found] = 0.0  # equal infinities too
        self.difference = max(self.difference, gap.max().item())
        excess = (gap / tolerance).nan_to_num(math.inf, math.inf)
        excess[gap == 0] = 0.0
        self.of_tolerance = max(self.of_tolerance, excess.max().item())


@dataclass
class _Calls:
    """What one pass of the trained network showed, in the order of the calls."""

    drawn: bool = False
    """Whether drawn spikes went on, instead of what was emitted."""
    currents: list[Tensor] = field(default_factory=list)
    emitted: list[Tensor] = field(default_factory=list)
    spikes: list[Tensor] = field(default_factory=list)
    """What went on to the layers behind the neuron."""
    inputs: list[Tensor] = field(default_factory=list)
    """Of layers and batch norms."""
    results: list[Tensor] = field(default_factory=list)
    """Of layers and batch norms."""
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class _Scales:
    """S of each current, and of each output."""

    currents: list[Tensor]
    outputs: list[Tensor]


class _MismatchError(Exception):
    """The networks do not run alike."""


@torch.no_grad()
def check_deployment(trained: nn.Module, deployed: nn.Module, samples: Sequence[Tensor]) -> DeploymentProof:
    """Compare a deployed network with the trained one, one sample at a time; neither is changed.

    Args:
        trained: the network that was deployed; in eval mode it is what was trained.
        deployed: `reparam.deploy(trained)`.
        samples: images [1, C, H, W] or frames [T, 1, C, H, W] in fp64.
    """
    gamma = _relative_tolerance(trained, deployed)
    reference = copy.deepcopy(trained).eval().double()
    found = copy.deepcopy(deployed).eval().double()
    gapped = _with_gaps_in_shifts(reference)
    segments: dict[str, _Segment] = {}
    failure = None
    for sample, draw in (*((sample, None) for sample in samples), (samples[0], _drawn), (samples[0], _complement)):
        calls = _watch(reference, sample, draw)
        try:
            _compare(gapped, found, sample, calls, gamma, segments)
        except _MismatchError as error:
            failure = str(error)
            break
    rows = {name: _row(name, segment) for name, segment in segments.items()}
    wrong = [name for name, row in rows.items() if not row.equal]
    if wrong and failure is None:
        for name, layers in suspects(reference, found, sample, calls.spikes, wrong).items():
            rows[name] = _row(name, segments[name], layers)
    return DeploymentProof(tuple(rows.values()), gamma, len(samples), failure)


def _row(name: str, segment: _Segment, layers: tuple[str, ...] = ()) -> SegmentProof:
    equal = segment.same_neuron and segment.of_tolerance <= 1
    return SegmentProof(
        name=name,
        equal=equal,
        max_difference=segment.difference,
        of_tolerance=segment.of_tolerance,
        same_neuron=segment.same_neuron,
        flipped=segment.flipped,
        emitted=segment.emitted,
        layers=() if equal else layers,
    )


def _relative_tolerance(trained: nn.Module, deployed: nn.Module) -> float:
    layers = [module for module in (*trained.modules(), *deployed.modules()) if isinstance(module, Layer)]
    fan_in = max((layer.weight[0].numel() for layer in layers), default=1)
    types = {parameter.dtype for parameter in deployed.parameters() if parameter.is_floating_point()}
    stored = max((torch.finfo(dtype).eps for dtype in types - {torch.float64}), default=0.0)
    return (3 * fan_in + 64) * 2.0**-53 + stored


_Draw = Callable[[torch.Size, int, torch.Generator], Tensor]


def _drawn(shape: torch.Size, bound: int, generator: torch.Generator) -> Tensor:
    return drawn_integers(shape, bound, _RATE, generator)


def _complement(shape: torch.Size, bound: int, generator: torch.Generator) -> Tensor:
    return bound - _drawn(shape, bound, generator)


def _watch(network: nn.Module, sample: Tensor, draw: _Draw | None = None) -> _Calls:
    calls = _Calls(drawn=draw is not None)
    generator = torch.Generator().manual_seed(0)

    def neuron(module: SpikingNode, args: tuple[Any, ...], emitted: Tensor) -> Tensor:
        # Copies: operations in place may come next.
        calls.currents.append(args[0].clone())
        calls.emitted.append(emitted.clone())
        spikes = emitted if draw is None else draw(emitted.shape, module.bound, generator).to(emitted)
        calls.spikes.append(spikes.clone())
        return spikes

    def layer(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        calls.inputs.append(args[0].clone())
        calls.results.append(result.clone())

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, Layer | _BatchNorm):
                stack.callback(module.register_forward_hook(layer).remove)
        for node in spiking_nodes(network).values():
            stack.callback(node.register_forward_hook(neuron).remove)
        calls.outputs = [output.clone() for output in _outputs(network, sample)]
    return calls


def _scales(gapped: nn.Module, sample: Tensor, calls: _Calls, draw: int) -> _Scales:
    """S by a pass with gaps; signs are drawn where `draw` is not 0."""
    generator = torch.Generator().manual_seed(draw)
    currents: list[Tensor] = []
    absolute = {module: _absolute(module) for module in gapped.modules() if isinstance(module, Layer)}
    layers = iter(zip(calls.inputs, calls.results, strict=True))
    spikes = iter(calls.spikes)
    whole = iter(calls.currents)

    def neuron(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        currents.append((args[0] - next(whole)).abs() / _GAP)
        return next(spikes)

    def layer(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        given, before = next(layers)
        size = given.abs() + (args[0] - given).abs() / _GAP
        term = absolute[module](size) if isinstance(module, Layer) else _term_of_norm(module, size)
        if draw:
            signs = torch.randint(2, term.shape, generator=generator).to(term.device) * 2 - 1
            term = term * signs
        return before + _GAP * term

    with ExitStack() as stack:
        for module in gapped.modules():
            if isinstance(module, Layer | _BatchNorm):
                stack.callback(module.register_forward_hook(layer).remove)
        for node in spiking_nodes(gapped).values():
            stack.callback(node.register_forward_hook(neuron).remove)
        outputs = _outputs(gapped, sample)
    responses = [(one - other).abs().nan_to_num(0.0) / _GAP for one, other in zip(outputs, calls.outputs, strict=True)]
    return _Scales(currents, responses)


def _with_gaps_in_shifts(network: nn.Module) -> nn.Module:
    """A copy for `_scales`: a border that is padded with the shift of a batch norm errs as that does."""
    gapped = copy.deepcopy(network)
    for norm in gapped.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.bias is not None:
            norm.bias.add_(_GAP * (norm.bias.abs() + affine(norm).scale.abs() * norm.running_mean.abs()))
    return gapped


def _absolute(layer: Layer) -> Layer:
    """The layer with |w| and |b|: of |x| and of what x has lost, it gives |w| |x| + |b|."""
    absolute = copy.deepcopy(layer)
    for parameter in absolute.parameters():
        parameter.abs_()
    return absolute


def _term_of_norm(norm: nn.Module, size: Tensor) -> Tensor:
    """|scale| |x| + |scale| |mean| + |shift| of a batch norm."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None:
        return size
    scale = affine(norm).scale.abs()
    constant = scale * norm.running_mean.abs()
    if norm.bias is not None:
        constant = constant + norm.bias.abs()
    shape = (1, -1, *[1] * (size.ndim - 2))
    return size * scale.view(shape) + constant.view(shape)


def _compare(
    gapped: nn.Module,
    network: nn.Module,
    sample: Tensor,
    calls: _Calls,
    gamma: float,
    segments: dict[str, _Segment],
) -> None:
    """Run the deployed network with the trained one's spikes.

    Raises:
        _MismatchError: it runs its neurons otherwise, or shapes differ.
    """
    nodes = spiking_nodes(network)
    # A neuron may keep its state, which a second call would change.
    copies = {name: copy.deepcopy(node) for name, node in nodes.items()}
    for node in copies.values():
        node.reset()
    scales = _scales(gapped, sample, calls, 0)
    count = 0

    def before(name: str) -> Callable[..., Tensor]:
        def force(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            if count == len(calls.currents):
                raise _MismatchError(f"neuron {name} runs once more in the deployed form than in the trained network")
            trained, current = calls.currents[count], args[0]
            if trained.shape != current.shape:
                raise _MismatchError(
                    f"neuron {name} takes {tuple(current.shape)} in the deployed form, {tuple(trained.shape)} in the "
                    "trained network"
                )
            segment = segments.setdefault(name, _Segment())
            segment.compare(trained, current, gamma * (scales.currents[count] + trained.abs()))
            if not calls.drawn:
                segment.flipped += int((copies[name](current) != calls.emitted[count]).sum())
                segment.emitted += current.numel()
            return trained

        return force

    def after(name: str) -> Callable[..., Tensor]:
        def force(module: nn.Module, args: tuple[Any, ...], emitted: Tensor) -> Tensor:
            nonlocal count
            segments[name].same_neuron &= torch.equal(emitted, calls.emitted[count])
            count += 1
            return calls.spikes[count - 1]

        return force

    with ExitStack() as stack:
        for name, node in nodes.items():
            stack.callback(node.register_forward_pre_hook(before(name)).remove)
            stack.callback(node.register_forward_hook(after(name)).remove)
        found = _outputs(network, sample)
    if count < len(calls.currents):
        raise _MismatchError(f"the deployed form runs {count} neurons, the trained network {len(calls.currents)}")
    if [output.shape for output in found] != [output.shape for output in calls.outputs]:
        raise _MismatchError("the deployed form has outputs of other shapes than the trained network")
    _compare_outputs(gapped, sample, calls, found, scales, gamma, segments)


def _compare_outputs(
    gapped: nn.Module,
    sample: Tensor,
    calls: _Calls,
    found: Sequence[Tensor],
    scales: _Scales,
    gamma: float,
    segments: dict[str, _Segment],
) -> None:
    alike = all(torch.equal(one, other) for one, other in zip(calls.outputs, found, strict=True))
    drawn = () if alike else tuple(_scales(gapped, sample, calls, draw) for draw in range(1, _DRAWS + 1))
    for index, (trained, output) in enumerate(zip(calls.outputs, found, strict=True)):
        segment = segments.setdefault(output_name(index), _Segment())
        if not output.numel() or (calls.drawn and not trained.isfinite().all()):
            continue  # no output was made for drawn spikes
        scale = torch.stack([one.outputs[index].max() for one in (scales, *drawn)]).max()
        segment.compare(trained, output, gamma * (scale + trained.abs()))


def _outputs(network: nn.Module, sample: Tensor) -> list[Tensor]:
    for node in spiking_nodes(network).values():
        node.reset()  # one may keep its state from the pass before
    leaves = tree_leaves(network(sample.clone()))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
