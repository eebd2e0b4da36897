"""Promotes a version through the gates: measured against the champion on the gate images, then settled under the lease.

Measuring takes seconds to minutes, so it happens before the lease is taken. If another job has changed the champion
meanwhile, the candidate is measured against the new one, at most three times.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from spikefleet import registry
from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.errors import RunError
from spikefleet.gates.gate_store import GateStore, check_gate_store, open_gate_store
from spikefleet.gates.judging import Verdict, decision_of, judge, uncompared
from spikefleet.gates.measuring import Measured, measure
from spikefleet.registry.aliases import Promotion, candidate_of
from spikefleet.registry.mlflow_store import connect
from spikefleet.registry.promotion import Decision, barred
from spikefleet.registry.version import CHAMPION, RegisteredModel
from spikefleet.status import Announce, Count, silent, uncounted
from spikefleet_pipelines.store.reader import Store

COMPARISONS: Final = "spikefleet.gate_comparisons"
"""Tag of a registered model: content hash of its gate store, and the number of comparisons on it."""

_ATTEMPTS = 3


Judged = Callable[[Verdict, Measured, Measured | None], None]
"""Called with a verdict, the candidate, and the champion if there is one."""


def unrecorded(verdict: Verdict, candidate: Measured, champion: Measured | None) -> None:
    """Records nothing."""


@dataclass(frozen=True)
class GatedPromotion:
    """A promotion through the gates, with what was measured."""

    promotion: Promotion
    verdict: Verdict
    candidate: Measured
    champion: Measured | None


def promote_through_gates(
    name: str,
    version: int,
    settings: RetrainConfig,
    stores_dir: Path,
    tracking_uri: str,
    *,
    used: Store | None,
    gpu: bool = False,
    retraining: str | None = None,
    judged: Judged = unrecorded,
    announce: Announce = silent,
    progress: Count = uncounted,
) -> GatedPromotion:
    """Makes a version champion if it passes all gates against the present champion, else challenger.

    Args:
        name: of the registered model.
        version: number of the candidate.
        settings: with a gate store.
        stores_dir: directory of prepared stores.
        tracking_uri: of the registry.
        used: the store that the candidate was trained, chosen and tested with; None if it is not there.
        gpu: measure on the GPU, if there is one.
        retraining: id of the retraining that asks for it.
        judged: called with each verdict before an alias is moved, and with what was measured.
        announce: called with what begins.
        progress: called with (done, in all) while it measures.

    Raises:
        UserError: the gate store cannot be used, or a version's files have changed.
        RunError: the champion changed again and again.
    """
    on_gpu = gpu and torch.cuda.is_available()
    gate = open_gate_store(settings, stores_dir)
    candidate: Measured | None = None
    champions: dict[int, Measured] = {}

    def measured(of: RegisteredModel, number: int) -> Measured:
        return measure(of.pick(number), gate.split, tracking_uri, gpu=on_gpu, announce=announce, progress=progress)

    for _ in range(_ATTEMPTS):
        model = registry.show(name, tracking_uri=tracking_uri)
        if candidate is None:
            candidate = measured(model, version)
            gate = check_gate_store(gate, candidate.data, used, announce)
        before = None if model.champion is None else model.champion.version
        if before is None or before == version:
            champion = None
            verdict = uncompared(model.pick(version), len(gate.split), gate.content_hash)
        else:
            if before not in champions:
                champions[before] = measured(model, before)
            champion = champions[before]
            announce("comparing with the champion")
            verdict = judge(
                candidate,
                champion,
                settings,
                gate_store=gate.content_hash,
                comparisons=_comparisons(name, gate.content_hash, tracking_uri) + 1,
                warnings=(*gate.warnings, *_seen_by(champion, gate)),
                progress=progress,
            )
        judged(verdict, candidate, champion)
        decided = _Rule(name, before, decision_of(verdict, model.pick(version)), verdict, tracking_uri)
        promotion = registry.settle(
            name, version, decided, retraining=retraining, tracking_uri=tracking_uri, announce=announce
        )
        if promotion is not None:
            return GatedPromotion(promotion, verdict, candidate, champion)
        announce("another job has changed the champion; comparing with the new one")
    raise RunError(
        f"the champion of model {name} changed {_ATTEMPTS} times while version {version} was compared with it; run the "
        "same command again"
    )


@dataclass(frozen=True)
class _Rule:
    """Holds to a decision, unless the champion is another one by now than that which was compared."""

    name: str
    champion: int | None
    decision: Decision
    verdict: Verdict
    tracking_uri: str

    def __call__(self, model: RegisteredModel) -> Decision | None:
        if self.champion != (None if model.champion is None else model.champion.version):
            return None
        if self.verdict.champion is not None:
            _count(self.name, self.verdict.gate_store, self.tracking_uri)
        if self.decision.alias == CHAMPION:
            # It may have been rolled back since it was measured.
            return barred(candidate_of(model.pick(self.verdict.candidate), "")) or self.decision
        return self.decision


def _seen_by(champion: Measured, gate: GateStore) -> list[str]:
    """Whether the champion was trained on the gate images, before they were taken out of its data."""
    taken = gate.split.manifest.options.get(f"taken_{gate.split.name}")
    if not isinstance(taken, dict) or taken.get("of") != champion.data.content_hash:
        return []
    return [
        f"champion version {champion.version.version} was trained on the data that the gate images were taken from, so "
        "it has seen them, which is in its favour"
    ]


def _comparisons(name: str, gate_store: str, tracking_uri: str) -> int:
    """Comparisons so far of versions of a model on a gate store."""
    with connect(tracking_uri) as client:
        text = client.get_registered_model(name).tags.get(COMPARISONS, "")
    try:
        found = json.loads(text)
        return int(found["count"]) if found["gate_store"] == gate_store else 0
    except (ValueError, TypeError, KeyError):
        return 0


def _count(name: str, gate_store: str, tracking_uri: str) -> None:
    count = _comparisons(name, gate_store, tracking_uri) + 1
    with connect(tracking_uri) as client:
        client.set_registered_model_tag(name, COMPARISONS, json.dumps({"gate_store": gate_store, "count": count}))
