"""Whether binary, spike-driven inference equals the network that was trained with integers: proof, flips, figures.

The proof is `spikefleet_models.equivalence`: both forms of the merged network in fp64, layer by layer. What rounding
does in the types that people run is counted beside it, and what it does to the task's figures is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikefleet.certificates.verdict import NOT_SPIKING, PROVED, REFUTED
from spikefleet.config.schema import Config
from spikefleet.files import write_json
from spikefleet.status import Count, uncounted
from spikefleet.tasks import AnyTask
from spikefleet.training.evaluation import first_batches
from spikefleet_models.equivalence import EquivalenceProof, FlipCount, check_equivalence, count_flips
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import check_finite
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Split

PROOF = "spike_check.json"
"""Name of the proof's file in a report and in a registered version."""

_FLIP_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class SpikeCheck:
    """What a check found; `proof` is None for a network without neurons, or one that has no spike-driven form."""

    proof: EquivalenceProof | None
    refusal: str | None
    """Why there is no spike-driven form."""
    flips: tuple[FlipCount, ...] = ()
    figures: dict[str, dict[str, float]] | None = None
    """The task's figures of the integer and of the binary form in fp32, over the same pictures."""
    remark: str | None = None
    """Why flips or figures are missing beside a proof."""

    @property
    def verdict(self) -> str:
        """`proved`, `refuted` or `not spiking`."""
        if self.proof is None:
            return NOT_SPIKING if self.refusal is None else REFUTED
        return PROVED if self.proof.passed else REFUTED

    @property
    def why(self) -> str | None:
        """What refuted it, in words."""
        if self.proof is None or self.proof.passed:
            return self.refusal
        outputs = () if self.proof.outputs_equal else ("its outputs",)
        return self.proof.failure or f"it differs in {', '.join((*self.proof.unequal, *outputs))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "verdict": self.verdict,
            "refusal": self.refusal,
            "proof": None if self.proof is None else self.proof.to_dict(),
            "flips": [count.to_dict() for count in self.flips],
            "figures": self.figures,
            "remark": self.remark,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())


def check_spikes(
    network: nn.Module,
    task: AnyTask,
    config: Config,
    split: Split,
    *,
    pictures: int = 2,
    measured: int = 0,
    progress: Count = uncounted,
) -> SpikeCheck:
    """Checks a trained network on the first pictures of a split.

    Args:
        network: on the CPU, as it was trained; not changed.
        pictures: on so many the proof is made and flips are counted.
        measured: on so many, or a few more, the figures of both forms are compared; 0 leaves that out.
        progress: called with (pictures measured, pictures to measure).

    Raises:
        Exception: whatever kept the proof from being made; only `NotSpikeDrivenError` is a finding about the network.
    """
    if not spiking_nodes(network):
        return SpikeCheck(None, None)
    loader = BatchLoader(split, config.data.transform, train=False)
    shown = min(pictures, len(split))
    images = next(first_batches(loader, shown, shown)).images
    try:
        check_finite(network)  # an infinite variance is folded to weights of zero
        deployed = deploy(network)
        proof = check_equivalence(deployed, images)
    except NotSpikeDrivenError as error:
        return SpikeCheck(None, str(error))
    try:
        flips = tuple(count_flips(deployed, images, dtype) for dtype in _FLIP_TYPES)
        forms = {"integer": deployed, "binary": spike_driven(deployed)}
        figures = _figures(forms, task, config, loader, measured, progress) if measured else None
    except NotSpikeDrivenError as error:
        return SpikeCheck(proof, None, remark=str(error))
    return SpikeCheck(proof, None, flips, figures)


def _figures(
    forms: Mapping[str, nn.Module],
    task: AnyTask,
    config: Config,
    loader: BatchLoader,
    count: int,
    progress: Count = uncounted,
) -> dict[str, dict[str, float]]:
    predictions: dict[str, list[Any]] = {name: [] for name in forms}
    truths: list[Any] = []
    with torch.inference_mode():
        for batch in first_batches(loader, config.train.eval_batch, count):
            truths += task.targets(batch)
            for name, form in forms.items():
                predictions[name] += task.predict(form, batch)
            progress(len(truths), max(count, len(truths)))
    return {name: task.metrics(found, truths) for name, found in predictions.items()}
