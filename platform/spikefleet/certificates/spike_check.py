"""Whether binary, spike-driven inference equals the network that was trained: a proof in three legs.

The first two are `spikefleet_models.equivalence`, in fp64: the trained network against its deployed form, and that
against its binary form, layer by layer. The third is the task's metric of the trained network and of the binary form,
in the type that is served. What rounding does to integers in the types that people run is counted beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikefleet.certificates.metric_leg import SERVED, MetricLeg, compare_metrics
from spikefleet.certificates.verdict import NOT_SHOWN, NOT_SPIKING, PROVED, REFUTED
from spikefleet.config.schema import Config
from spikefleet.files import write_json
from spikefleet.status import Count, uncounted
from spikefleet.tasks import AnyTask
from spikefleet.training.evaluation import ChosenPlan, first_batches
from spikefleet_models.deployment import check_deployment
from spikefleet_models.equivalence import check_equivalence, count_flips
from spikefleet_models.firing import Chosen, choose_images
from spikefleet_models.low_precision import Precision, SpikeDifference, compare_spikes, rounded, with_precision
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.proof import EquivalenceProof, FlipCount
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError, reuse_equal_slots
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import check_finite, layer_inputs
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples

PROOF = "spike_check.json"
"""Name of the proof's file in a report and in a registered version."""

MOST_IMAGES = 256
"""Images to look at, at most, for some on which every layer fires."""

_FLIP_TYPES = (torch.float32, torch.bfloat16)
_FLIP_IMAGES = 2
_LOOKED_AT_ONCE = 16
_NAMES_SHOWN = 20


def proof_file(precision: Precision) -> str:
    """Name of the file of a proof in this precision: that of fp32 is the certificate of a run."""
    return PROOF if precision == "fp32" else f"spike_check_{precision}.json"


@dataclass(frozen=True)
class Leg:
    """One leg of the proof."""

    name: str
    """`deployed`, `binary` or `metric`."""
    passed: bool
    max_difference: float
    says: str
    """What was found, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        finite = self.max_difference if self.max_difference < float("inf") else None
        verdict = "equal" if self.passed else "differs"
        return {"name": self.name, "verdict": verdict, "max_difference": finite, "says": self.says}


@dataclass(frozen=True)
class SpikeCheck:
    """What a check found; `proof` is None for a network without neurons, or one that has no spike-driven form."""

    proof: EquivalenceProof | None
    refusal: str | None
    """Why there is no spike-driven form."""
    flips: tuple[FlipCount, ...] = ()
    metrics: MetricLeg | None = None
    """None where metrics were not to be measured."""
    chosen: Chosen | None = None
    """The images of the proof, as positions in the split."""
    remark: str | None = None
    """Why flips are missing beside a proof."""
    precision: Precision = "fp32"
    """Of the weights of the layers that spikes feed."""
    rounding: SpikeDifference | None = None
    """Integers that these weights change, in the type that is served; None for fp32."""

    @property
    def verdict(self) -> str:
        """`proved`, `refuted`, `not shown` or `not spiking`."""
        if self.proof is None:
            return NOT_SPIKING if self.refusal is None else REFUTED
        if not all(leg.passed for leg in self.legs):
            return REFUTED
        return PROVED if self.proof.outputs_vary else NOT_SHOWN

    @property
    def why(self) -> str | None:
        """Why it is neither proved nor without spikes, in words."""
        if self.proof is None or not self.proof.passed:
            return self.refusal if self.proof is None else self.proof.why
        if self.metrics is not None and not self.metrics.passed:
            return (
                f"{self.metrics.metric} of the binary form in {SERVED} differs by {self.metrics.difference:+.4g} on "
                f"{self.metrics.images} images, more than {self.metrics.tolerance:.4g}"
            )
        if self.proof.outputs_vary:
            return None
        if self.proof.outputs_vary is None:
            return "there is only one image, so nothing is known about how outputs depend on it"
        return "its output is the same for every image, so that equal forms show nothing; train it"

    @property
    def legs(self) -> tuple[Leg, ...]:
        """The legs that were compared, in their order."""
        if self.proof is None:
            return ()
        legs = []
        trained = self.proof.deployment
        if trained is not None:
            most = max((segment.of_tolerance for segment in trained.segments), default=0.0)
            before = "" if self.precision == "fp32" else f", before weights are rounded to {self.precision}"
            says = (
                f"trained network = deployed form (fp64{before}): {_equal(trained.passed)}, largest difference "
                f"{trained.max_difference:.2g}, {most:.2g} of what rounding explains; "
                f"{trained.flipped:,} of {trained.emitted:,} integers differ"
            )
            legs.append(Leg("deployed", trained.passed, trained.max_difference, says))
        passed, largest = self.proof.binary_equal, self.proof.max_difference
        form = "deployed form" if self.precision == "fp32" else f"deployed form with weights in {self.precision}"
        says = f"{form} = binary form (fp64, bit for bit): {_equal(passed)}, largest difference {largest:.2g}"
        legs.append(Leg("binary", passed, largest, says))
        if self.metrics is not None:
            says = (
                f"{self.metrics.metric} ({SERVED}, {self.metrics.images} images): trained network "
                f"{self.metrics.trained[self.metrics.metric]:.4f}, binary form "
                f"{self.metrics.binary[self.metrics.metric]:.4f}, difference {self.metrics.difference:+.4f}"
            )
            legs.append(Leg("metric", self.metrics.passed, self.metrics.max_difference, says))
        return tuple(legs)

    @property
    def silent(self) -> str | None:
        """Names of the layers that were compared alone, for a sentence; None if all saw spikes."""
        names = () if self.proof is None else self.proof.silent
        more = len(names) - _NAMES_SHOWN
        return ", ".join((*names[:_NAMES_SHOWN], *((f"{more} more",) if more > 0 else ()))) or None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "verdict": self.verdict,
            "why": self.why,
            "refusal": self.refusal,
            "legs": [leg.to_dict() for leg in self.legs],
            "silent": self.silent,
            "images": None if self.chosen is None else list(self.chosen.positions),
            "looked_at": None if self.chosen is None else self.chosen.looked_at,
            "proof": None if self.proof is None else self.proof.to_dict(),
            "flips": [count.to_dict() for count in self.flips],
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
            "remark": self.remark,
            "precision": self.precision,
            "rounding": None if self.rounding is None else asdict(self.rounding),
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())


def check_spikes(
    network: nn.Module,
    task: AnyTask,
    config: Config,
    split: Samples,
    *,
    images: int = MOST_IMAGES,
    measured: int = 0,
    precision: Precision = "fp32",
    progress: Count = uncounted,
) -> SpikeCheck:
    """Checks a trained network on images of a split.

    With weights in bf16 or int8 the deployed form is compared with the trained network before they are rounded, and
    with its binary form after that.

    Args:
        network: on the CPU, in evaluation mode, as it was trained; not changed.
        task: computes the metrics.
        config: of the run.
        split: where the images are from.
        images: so many are looked at, at most, for some on which every layer fires; the proof is made on those.
        measured: on so many, or a few more, the metrics of both forms are compared; 0 leaves that out.
        precision: of the weights of the layers that spikes feed.
        progress: called with (images measured, images to measure).

    Raises:
        ValueError: nothing of the network can be rounded.
        Exception: whatever kept the proof from being made; only `NotSpikeDrivenError` is a finding about the network.
    """
    if not spiking_nodes(network):
        return SpikeCheck(None, None)
    loader, spikes_in = BatchLoader(split, config.transform, train=False), config.transform.binary_input
    try:
        check_finite(network)  # an infinite variance is folded to weights of zero
        unrounded = deploy(network)
        deployed = rounded(unrounded, precision)
        chosen, shown = _images(deployed, loader, images, spikes_in)
        proof = _proof(network, unrounded, precision, shown, spikes_in)
    except NotSpikeDrivenError as error:
        return SpikeCheck(None, str(error), precision=precision)
    flips: tuple[FlipCount, ...] = ()
    remark = None
    try:
        few = shown.narrow(shown.ndim - 4, 0, min(_FLIP_IMAGES, len(chosen.positions)))
        flips = tuple(count_flips(deployed, few, dtype, spikes_in) for dtype in _FLIP_TYPES)
    except NotSpikeDrivenError as error:  # rounding can change what runs behind the last neuron
        remark = str(error)
    try:
        binary = spike_driven(deployed, layer_inputs(deployed, shown, spikes_in))
    except NotSpikeDrivenError as error:
        return SpikeCheck(None, str(error), flips, chosen=chosen, precision=precision)
    reuse_equal_slots(binary)
    metrics = compare_metrics(network, binary, task, config, loader, measured, progress) if measured else None
    rounding = None if precision == "fp32" else compare_spikes(unrounded, with_precision(unrounded, precision), shown)
    return SpikeCheck(proof, None, flips, metrics, chosen, remark, precision, rounding)


def _proof(
    network: nn.Module, deployed: nn.Module, precision: Precision, images: Tensor, binary_input: bool
) -> EquivalenceProof:
    exact = copy.deepcopy(network).double()  # folded weights are not rounded to fp32 then
    if precision == "fp32":
        return check_equivalence(deploy(exact), images, trained=exact, binary_input=binary_input)
    # In fp64 a rounded weight is its integer times its scale, to the bit; both are found from the fp32 weights.
    proof = check_equivalence(rounded(copy.deepcopy(deployed).double(), precision), images, binary_input=binary_input)
    samples = images.double().split(1, dim=images.ndim - 4)
    return replace(proof, deployment=check_deployment(exact, deploy(exact), samples))


def check_images(network: nn.Module, images: Tensor, binary_input: bool = False) -> SpikeCheck:
    """Makes the first two legs of the proof on given images; they hold for any image, and the metric needs targets.

    Args:
        network: on the CPU, in evaluation mode, as it was trained; not changed.
        images: as the network takes them, at least two.
        binary_input: whether they are event frames of 0 and 1.

    Raises:
        Exception: as for `check_spikes`.
    """
    if not spiking_nodes(network):
        return SpikeCheck(None, None)
    try:
        check_finite(network)
        exact = copy.deepcopy(network).double()
        return SpikeCheck(check_equivalence(deploy(exact), images, trained=exact, binary_input=binary_input), None)
    except NotSpikeDrivenError as error:
        return SpikeCheck(None, str(error))


def _images(deployed: nn.Module, loader: BatchLoader, most: int, binary_input: bool) -> tuple[Chosen, Tensor]:
    """Images on which every layer fires, as far as the first ones of the split have such."""
    most = min(most, len(loader.split))

    def batches() -> Iterator[Tensor]:
        left = most
        for batch in first_batches(loader, min(_LOOKED_AT_ONCE, most), most):
            yield batch.network_input.narrow(batch.images.ndim - 4, 0, min(left, len(batch.indices)))
            left -= len(batch.indices)

    first = next(first_batches(loader, 1, 1)).network_input
    chosen = choose_images(deployed, layer_inputs(deployed, first, binary_input), batches())
    plan = ChosenPlan(len(loader.split), tuple(chosen.positions))
    return chosen, next(iter(loader.epoch(plan, epoch=0))).network_input


def _equal(passed: bool) -> str:
    return "equal" if passed else "differ"
