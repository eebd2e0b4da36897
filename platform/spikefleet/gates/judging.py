"""The gates: what a candidate must show on the gate images before it replaces the champion.

Each gate gives a value, a limit and a sentence. All must pass: proof of binary inference and nothing that speaks
against the network; better than the champion by more than chance; no class much worse; energy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikefleet.certificates.verdict import PROVED
from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.gates.measuring import Measured
from spikefleet.gates.paired import PairedCounts, holm, worse_classes
from spikefleet.registry.aliases import candidate_of
from spikefleet.registry.promotion import Decision, barred
from spikefleet.registry.version import CHAMPION, RegisteredVersion
from spikefleet.status import Count, uncounted
from spikefleet.tasks.per_image import Answers, Boxes
from spikefleet.tasks.resampled_map import Matches, least_p, resampled_gains
from spikefleet_tune.messages import counted

WORN_OUT = 50
"""Comparisons on the same gate images from which the report warns that their use wears them out."""

FEW_UNITS = 20
"""Recordings, or images, below which the report warns that their bootstrap is unsure."""

_NAMED = 5
_BETTER = "better"
_RESAMPLES_BY_ALPHA = 10


@dataclass(frozen=True)
class Gate:
    """The outcome of one gate."""

    name: str
    value: float | str | None
    limit: float | str | None
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of all gates for a candidate against a champion."""

    candidate: int
    champion: int | None
    """None: there is no champion, so nothing is compared."""
    gates: tuple[Gate, ...]
    images: int
    """Number of gate images."""
    gate_store: str
    """Content hash of the store with the gate images."""
    comparisons: int
    """Comparisons on these images so far, with this one."""
    alpha: float
    """Chance of promoting a network that is no better, in this comparison."""
    detectable_gain: float | None = None
    """The gain that so many images show about four times in five; None where nothing is compared."""
    interval: tuple[float, float] | None = None
    """Of the gain, 95 %."""
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the candidate becomes champion."""
        return all(gate.passed for gate in self.gates)

    @property
    def reason(self) -> str:
        """Why, in words: what speaks against it, or the gain."""
        failed = [gate.sentence for gate in self.gates if not gate.passed]
        return "; ".join(failed or [gate.sentence for gate in self.gates if gate.name == _BETTER])

    def to_json(self) -> dict[str, Any]:
        """Plain data for `gates.json`."""
        return {**asdict(self), "passed": self.passed, "reason": self.reason}


def soundness(version: RegisteredVersion) -> list[Gate]:
    """The gates that look at the candidate alone.

    Args:
        version: as the registry has it now, whose files were verified against its content hash.
    """
    refusal = barred(candidate_of(version, ""))
    proof = version.tags.get("spike_driven", "unknown")
    says = f"version {version.version} may be champion: its proof of binary inference says {proof}"
    return [
        Gate("proof and flaws", proof, PROVED, refusal is None, says if refusal is None else refusal.reason),
        Gate(
            "content hash",
            version.content_hash[:12],
            version.content_hash[:12],
            True,
            f"the files of version {version.version} are those that were registered",
        ),
    ]


def judge(
    candidate: Measured,
    champion: Measured,
    settings: RetrainConfig,
    *,
    gate_store: str,
    comparisons: int,
    warnings: Sequence[str] = (),
    progress: Count = uncounted,
) -> Verdict:
    """Compares a candidate with the champion by all gates.

    Args:
        candidate: on the gate images.
        champion: on the same gate images.
        settings: limits of the gates.
        gate_store: content hash of the store with the gate images.
        comparisons: on these images, with this one.
        warnings: about the gate images.
        progress: called with (resamples done, in all).
    """
    alpha = settings.alpha / comparisons if settings.guard else settings.alpha
    images = len(candidate.predictions)
    compared = _compare(candidate, champion, settings, alpha, progress)
    notes = [*warnings, *compared.warnings]
    if compared.detectable is not None and compared.detectable > settings.margin:
        notes.append(
            f"{counted(images, 'gate image')} can show a gain of {compared.detectable:.2%} about four times in five; a "
            f"gain of retrain.margin={settings.margin:.2%} would stay unseen"
        )
    if comparisons >= WORN_OUT:
        notes.append(
            f"{comparisons} comparisons were made on these gate images, which makes networks fit them; make a new gate "
            "store, or set retrain.guard=true"
        )
    return Verdict(
        candidate.version.version,
        champion.version.version,
        (*soundness(candidate.version), *compared.gates, _energy(candidate, champion, settings)),
        images,
        gate_store,
        comparisons,
        alpha,
        compared.detectable,
        compared.interval,
        tuple(notes),
    )


def uncompared(candidate: RegisteredVersion, images: int, gate_store: str) -> Verdict:
    """The verdict where there is no other champion to compare with."""
    is_champion = CHAMPION in candidate.aliases
    says = f"version {candidate.version} is {'already the' if is_champion else 'the first'} champion"
    better = Gate(_BETTER, None, None, True, says)
    return Verdict(candidate.version, None, (*soundness(candidate), better), images, gate_store, 0, 0.0)


def decision_of(verdict: Verdict, candidate: RegisteredVersion) -> Decision:
    """The alias that follows from a verdict."""
    if verdict.passed:
        return Decision("champion", verdict.reason)
    refusal = barred(candidate_of(candidate, ""))
    alias = "challenger" if refusal is None else refusal.alias
    return Decision(alias, verdict.reason)


def _energy(candidate: Measured, champion: Measured, settings: RetrainConfig) -> Gate:
    limit = champion.energy_mj * (1 + settings.energy_slack)
    passed = candidate.energy_mj <= limit
    sentence = (
        f"energy {candidate.energy_mj:.4g} mJ per image is {'within' if passed else 'above'} the limit of {limit:.4g} "
        f"mJ (champion {champion.energy_mj:.4g} mJ, retrain.energy_slack={settings.energy_slack:g})"
    )
    return Gate("energy", candidate.energy_mj, limit, passed, sentence)


@dataclass(frozen=True)
class _Compared:
    """The gates of the classes and of the gain."""

    gates: tuple[Gate, ...]
    detectable: float | None = None
    interval: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()


def _compare(
    candidate: Measured, champion: Measured, settings: RetrainConfig, alpha: float, progress: Count
) -> _Compared:
    ours, theirs = candidate.results, champion.results
    if isinstance(ours, Answers) and isinstance(theirs, Answers):
        return _compare_answers(candidate, ours, theirs, settings, alpha)
    if isinstance(ours, Boxes) and isinstance(theirs, Boxes):
        return _compare_boxes(candidate, ours, theirs, settings, alpha, progress)
    sentence = (
        f"task {candidate.config.task} has no results by image, so nothing shows that version "
        f"{candidate.version.version} is better"
    )
    return _Compared((Gate(_BETTER, None, alpha, False, sentence),))


def _compare_answers(
    candidate: Measured, ours: Answers, theirs: Answers, settings: RetrainConfig, alpha: float
) -> _Compared:
    counts = PairedCounts.of(ours.right, theirs.right)
    worse = worse_classes(ours.right, theirs.right, ours.target.astype(np.int64), settings.class_drop, settings.alpha)
    drops = {candidate.data.class_names[label]: -one.gain for label, one in worse.items()}
    passed = counts.p_better <= alpha and counts.gain >= settings.margin
    sentence = _gain_sentence(
        candidate.version.version,
        passed,
        f"top-1 {ours.right.mean():.2%} against {theirs.right.mean():.2%} on {counts.images:,} gate images; "
        f"{counts.gained} right by it alone, {counts.lost} by the champion alone",
        counts.gain,
        counts.p_better,
        settings,
        alpha,
        "exact McNemar test",
    )
    better = Gate(_BETTER, counts.p_better, alpha, passed, sentence)
    return _Compared((better, _classes_gate(drops, settings)), counts.detectable_gain, counts.interval())


def _compare_boxes(
    candidate: Measured, ours: Boxes, theirs: Boxes, settings: RetrainConfig, alpha: float, progress: Count
) -> _Compared:
    named = candidate.data.class_names, candidate.data.category_ids
    matches = [Matches(*one.coco(*named), one.max_detections) for one in (ours, theirs)]
    resamples = max(settings.resamples, math.ceil(_RESAMPLES_BY_ALPHA / alpha))  # a smaller p than 1 / n is not seen
    recordings = [target.moment.recording for target in ours.targets if target.moment is not None]
    drawn_together = np.array(recordings) if recordings else None
    totals, by_class = resampled_gains(
        matches[0], matches[1], resamples, progress=progress, drawn_together=drawn_together
    )
    totals = totals[~np.isnan(totals)]
    units = len(np.unique(drawn_together)) if drawn_together is not None else matches[0].images
    measured = [one.mean_average_precision()[0] for one in matches]
    gain = float(measured[0] - measured[1])
    # Of equal detections every gain is 0, which shows nothing.
    p_better = max(float((totals <= 0).mean()), 1 / (len(totals) + 1), least_p(units))
    passed = p_better <= alpha and gain >= settings.margin
    low, high = (float(q) for q in np.quantile(totals, [0.025, 0.975]))
    sentence = _gain_sentence(
        candidate.version.version,
        passed,
        f"mAP50-95 {measured[0]:.2%} against {measured[1]:.2%} on {matches[0].images:,} gate images",
        gain,
        p_better,
        settings,
        alpha,
        f"paired bootstrap{' of recordings' if recordings else ''}, {len(totals):,} resamples",
    )
    drops = _dropped_classes(candidate, matches, by_class, settings, units)
    better = Gate(_BETTER, p_better, alpha, passed, sentence)
    few = () if units >= FEW_UNITS else (_few_units(units, "recording" if recordings else "image"),)
    return _Compared((better, _classes_gate(drops, settings)), _detectable(totals), (low, high), few)


def _few_units(units: int, kind: str) -> str:
    """The warning that a bootstrap over so few recordings or images is unsure."""
    return (
        f"only {counted(units, f'gate {kind}')} can be resampled, and a bootstrap over fewer than {FEW_UNITS} is "
        f"unsure (its p is at least {least_p(units):.2g}); make a gate store with more {kind}s"
    )


def _detectable(totals: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The gain in mAP that is found about four times in five at a level of 5 %: 2.5 standard errors."""
    return 2.5 * float(totals.std())


def _dropped_classes(
    candidate: Measured,
    matches: Sequence[Matches],
    by_class: np.ndarray[Any, np.dtype[np.float64]],
    settings: RetrainConfig,
    units: int,
) -> dict[str, float]:
    """Classes whose AP falls by more than `class_drop`, where that is more than chance over all classes (Holm)."""
    ours, theirs = (one.average_precisions()[:, 0] for one in matches)
    there = [k for k in range(len(ours)) if not (np.isnan(ours[k]) or np.isnan(theirs[k]))]
    p_values = []
    for k in there:
        gains = by_class[k][~np.isnan(by_class[k])]
        p_values.append(max(float((gains >= 0).mean()), 1 / (len(gains) + 1), least_p(units)))
    adjusted = dict(zip(there, holm(p_values), strict=True))
    names = candidate.data.class_names
    return {
        names[k]: float(theirs[k] - ours[k])
        for k in there
        if theirs[k] - ours[k] > settings.class_drop and adjusted[k] <= settings.alpha
    }


def _classes_gate(drops: dict[str, float], settings: RetrainConfig) -> Gate:
    limit = settings.class_drop
    if not drops:
        return Gate("classes", 0, limit, True, f"no class is worse by more than {limit:.0%} and more than chance")
    named = sorted(drops.items(), key=lambda item: -item[1])[:_NAMED]
    shown = ", ".join(f"{name} by {drop:.1%}" for name, drop in named)
    sentence = f"{counted(len(drops), 'class', 'classes')} worse by more than {limit:.0%} and more than chance: {shown}"
    return Gate("classes", max(drops.values()), limit, False, sentence)


def _gain_sentence(
    version: int,
    passed: bool,
    measured: str,
    gain: float,
    p_better: float,
    settings: RetrainConfig,
    alpha: float,
    test: str,
) -> str:
    if passed:
        verdict = f"version {version} is better"
    elif gain <= 0:
        verdict = f"version {version} is not better"
    elif p_better > alpha:
        verdict = f"version {version} is not shown to be better: such a gain may be chance"
    else:
        verdict = f"version {version} gains less than retrain.margin={settings.margin:.2%}"
    return f"{verdict} ({measured}; gain {gain:+.2%}, p = {p_better:.2g}, limit {alpha:.2g}, {test})"
