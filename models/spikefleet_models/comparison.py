"""The integer and the binary form of a network side by side on the same images, layer by layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models import slots
from spikefleet_models.firing import outputs_differ
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.proof import LayerProof
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_edges import LayerInput, SpikeFed

_ELEMENTS_AT_ONCE = 2**16
"""Parts of this size stay in the cache; whole ones of D = 255 take longer to allocate than to look at."""

_RATES = (0.02, 0.3, 0.9)
"""Of the random spikes that silent layers are compared on."""

_DOUBLINGS = 30
"""Of the random currents of a silent neuron, at most."""


@dataclass
class _Tally:
    """Sums over the calls of one layer on all images."""

    node: bool
    elements: int = 0
    unequal: int = 0
    difference: float = 0.0
    binary: bool = True
    shape: torch.Size = field(default_factory=torch.Size)
    """Of what it is given in the integer form."""
    slots: int = 0
    ones: int = 0

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
        self.slots += spikes.numel()
        rows = max(1, _ELEMENTS_AT_ONCE * len(spikes) // max(1, spikes.numel()))
        for part in spikes.split(rows):
            fired = part != 0
            self.binary &= torch.equal(fired.to(part.dtype), part)
            self.ones += int(fired.count_nonzero())

    def check_integers(self, counts: Tensor, bound: int) -> None:
        self.binary &= bool(((counts >= 0) & (counts <= bound) & (counts == counts.round())).all())


@dataclass
class Comparison:
    """Both forms on the same images. The integer form's tensors are kept until the binary form's meet them."""

    integer: nn.Module
    binary: nn.Module
    inputs: Mapping[str, LayerInput]
    tallies: dict[str, _Tally] = field(default_factory=dict)
    output_difference: float = 0.0
    failure: str | None = None
    outputs_vary: bool | None = None

    def __post_init__(self) -> None:
        self._first_outputs: tuple[Tensor, ...] | None = None
        self._bounds = {name: node.bound for name, node in spiking_nodes(self.integer).items()}
        self._steps: dict[str, int] = {}

    @property
    def equal(self) -> bool:
        """Whether nothing has differed so far."""
        differs = self.output_difference or any(tally.unequal for tally in self.tallies.values())
        return self.failure is None and not differs

    @torch.no_grad()
    def run(self, sample: Tensor) -> None:
        """Run both forms on images, or on the frames of samples; mostly of one."""
        kept: dict[str, list[Tensor]] = {}

        def keep(name: str, given: Tensor, output: Tensor) -> None:
            tally = self.tallies.setdefault(name, _Tally(node=name in self._bounds, shape=given.shape))
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
        self._compare_images(expected)
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

    def _compare_images(self, outputs: tuple[Tensor, ...]) -> None:
        if self._first_outputs is None:
            self._first_outputs = tuple(output.clone() for output in outputs)
            return
        self.outputs_vary = bool(self.outputs_vary) or outputs_differ(self._first_outputs, outputs)

    @torch.no_grad()
    def run_silent_alone(self) -> tuple[str, ...]:
        """Compare what has seen no spike by itself: layers on random spikes, neurons on random currents.

        Returns:
            Their names.
        """
        silent = []
        generator = torch.Generator().manual_seed(0)
        for name, tally in self.tallies.items():
            source = self.inputs.get(name)
            if tally.ones or not (tally.node or isinstance(source, SpikeFed)):
                continue
            silent.append(name)
            one, other = self.integer.get_submodule(name), self.binary.get_submodule(name)
            for rate in _RATES:
                # Shares of ones are those of the images, so another tally counts.
                alone = _Tally(tally.node)
                if isinstance(source, SpikeFed):
                    counts = slots.drawn_integers(tally.shape, source.bound, rate, generator)
                    spikes = as_slots(counts, source.timesteps, source.bound)
                    alone.count_slots(spikes)
                    alone.compare(one(counts), other(spikes))
                else:
                    bound = self._bounds[name]
                    drawn = torch.rand(tally.shape, dtype=torch.float64, generator=generator)
                    currents = _firing(one, (2 * drawn + rate - 1) * bound, bound)
                    _reset(one, other)
                    spikes = other(currents)
                    alone.count_slots(spikes)
                    alone.compare(one(currents).to(torch.uint8), self._counts(name, spikes))
                tally.unequal += alone.unequal
                tally.difference = max(tally.difference, alone.difference)
                tally.binary &= alone.binary
        return tuple(silent)

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

    def rows(self, headroom: Mapping[str, int], silent: Sequence[str]) -> tuple[LayerProof, ...]:
        """One row for each layer, in the order in which they run."""
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
                    alone=name in silent,
                )
            )
        return tuple(rows)


def as_slots(counts: Tensor, timesteps: int, bound: int) -> Tensor:
    """Integers [T * B, ...] or [T, B, ...] -> slots [T * D * B, ...] or [T * D, B, ...]."""
    if bound == 1:
        return counts
    return slots.thermometer(counts.unflatten(0, (timesteps, -1)), bound).flatten(0, 1)


def _reset(*modules: nn.Module) -> None:
    for module in modules:
        for node in spiking_nodes(module).values():
            node.reset()


def _firing(node: nn.Module, currents: Tensor, bound: int) -> Tensor:
    """Currents that are doubled until the neuron emits D, since its threshold may be high or its input scaled."""
    for _ in range(_DOUBLINGS):
        _reset(node)
        if (node(currents) == bound).any():
            break
        currents = 2 * currents
    return currents


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
