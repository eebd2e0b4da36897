"""What the comparison of a network's forms found, as plain data."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spikefleet_models.deployment import DeploymentProof


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
    alone: bool = False
    """No spike came here on these images, so it was compared alone too: a layer on random spikes of several rates, a
    neuron on random currents."""


@dataclass(frozen=True)
class EquivalenceProof:
    """What `check_equivalence` found. Differences are infinite where shapes differ."""

    layers: tuple[LayerProof, ...]
    outputs_equal: bool
    max_output_difference: float
    images: int
    failure: str | None = None
    """What kept the comparison from being made, or made it worthless."""
    deployment: DeploymentProof | None = None
    """Trained network against its deployed form; None where no trained network was given."""
    outputs_vary: bool | None = None
    """Whether outputs of any two images differ by more than rounding; None for a single image. If none do, equality
    says little about the network, though it holds."""

    @property
    def passed(self) -> bool:
        """Everything was compared, everything is equal, and all that should be spikes is 0 or 1."""
        return self.binary_equal and (self.deployment is None or self.deployment.passed)

    @property
    def binary_equal(self) -> bool:
        """The deployed network equals its binary form."""
        return self.failure is None and self.outputs_equal and not self.unequal

    @property
    def unequal(self) -> tuple[str, ...]:
        """Layers that differ or that held something else than spikes, in network order."""
        return tuple(layer.name for layer in self.layers if not layer.equal or layer.binary is False)

    @property
    def silent(self) -> tuple[str, ...]:
        """Spike-fed layers and neurons without a spike on any image, which were compared alone."""
        return tuple(layer.name for layer in self.layers if layer.alone)

    @property
    def max_difference(self) -> float:
        """Largest difference between the deployed network and its binary form, of a layer or an output."""
        return max((self.max_output_difference, *(layer.max_difference for layer in self.layers)))

    @property
    def why(self) -> str | None:
        """What differs, in words; None if nothing does."""
        if not self.binary_equal:
            outputs = () if self.outputs_equal else ("its outputs",)
            return self.failure or f"the binary form differs in {', '.join((*self.unequal, *outputs))}"
        return None if self.deployment is None else self.deployment.why

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON but for infinite differences, which become None."""
        plain = {"passed": self.passed, "unequal": list(self.unequal), "silent": list(self.silent), **asdict(self)}
        if self.deployment is not None:
            plain["deployment"] |= {"passed": self.deployment.passed, "max_difference": self.deployment.max_difference}
        finite: dict[str, Any] = _finite(plain)
        return finite


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


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
