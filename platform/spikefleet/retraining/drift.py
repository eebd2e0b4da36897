"""The drift report: how new data differs from what the champion was trained on. It informs, and decides nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from spikefleet.certificates.drift_reference import Calibration, DriftReference, NetworkReference
from spikefleet.certificates.reference_measurement import reference_of
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.retraining.measures import (
    Counts,
    Level,
    calibration_error,
    chance_of_calibration,
    chance_of_change,
    chance_of_index,
    chi_square,
    grouped,
    kolmogorov_smirnov,
    level_of,
    relative_change,
    stability_index,
    total_variation,
)
from spikefleet.status import Count, one_line, uncounted
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.messages import counted

_LEAST_RATE = 1e-3
"""Firing rates below one spike in 1,000 are no base for a percentage."""

_LEAST_MJ = 1e-9
_NAMED = 3
"""Classes or layers that a sentence names."""

_NO_REFERENCE = (
    "the champion's training data is gone and its version has no reference.json: only names of classes and the size of "
    "images are known of it; shares of classes, brightness, contrast, firing rates, energy and calibration are not "
    "compared"
)

_SEVERITY: Mapping[Level, int] = {"strong": 2, "moderate": 1, "none": 0}

_FORMATS: Mapping[str, str] = {"PSI": "PSI {:.2f}", "relative change": "{:+.0%}", "rise": "{:+.1%}"}
"""Of the values of each kind of measure."""

_SHOWN: Mapping[str, str] = {
    "brightness": "{:.3f}",
    "contrast": "{:.3f}",
    "image width": "{:.4g} pixels",
    "image height": "{:.4g} pixels",
    "objects per image": "{:.3g}",
    "object area": "{:.2%} of the image",
}
"""How the mean of each property is written."""


@dataclass(frozen=True)
class Measure:
    """One property of the data, or of the network on it, before and after."""

    name: str
    kind: str
    """What `value` is: `PSI` (population stability index), `relative change` or `rise`."""
    value: float
    chance: float
    """What `value` exceeds once in 1,000 without drift."""
    before: str
    after: str
    statistics: Mapping[str, float] = field(default_factory=dict)
    details: str = ""

    @property
    def level(self) -> Level:
        """Of the alarm."""
        return level_of(abs(self.value), self.chance)

    @property
    def shown(self) -> str:
        """The value as a user reads it."""
        return _FORMATS[self.kind].format(self.value)

    @property
    def chance_shown(self) -> str:
        """What chance reaches, likewise."""
        return _FORMATS[self.kind].format(self.chance)

    @property
    def sentence(self) -> str:
        """The measure in words."""
        change = f": {self.before} before, {self.after} after" if self.before else ""
        return f"{self.level} drift of {self.name}{change} ({self.shown}{self.details})"


@dataclass(frozen=True)
class LayerChange:
    """The firing rate of a layer, as a fraction of the most that it can emit."""

    layer: str
    before: float
    after: float
    change: float
    """Relative."""
    chance: float
    """What its magnitude exceeds, in any of all layers, once in 1,000 without drift."""


@dataclass(frozen=True)
class DriftReport:
    """How new data differs from the data before."""

    before: DriftReference
    after: DriftReference
    measures: tuple[Measure, ...]
    """Worst first."""
    layers: tuple[LayerChange, ...]
    """In network order; empty where the network was not measured on both."""
    changes: tuple[str, ...]
    """Other classes, splits or sizes, in words."""
    missing: tuple[str, ...]
    """What could not be compared, and why."""

    @property
    def level(self) -> Level:
        """The worst alarm; "none" too where nothing could be compared."""
        return self.measures[0].level if self.measures else "none"

    @property
    def alarms(self) -> tuple[Measure, ...]:
        """The measures that have drifted, worst first."""
        return tuple(measure for measure in self.measures if measure.level != "none")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; `from_json` reads it."""
        return {
            "level": self.level,
            "measures": [{"level": one.level, **asdict(one)} for one in self.measures],
            "layers": [asdict(layer) for layer in self.layers],
            "changes": list(self.changes),
            "missing": list(self.missing),
            "sentences": self.sentences(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> DriftReport:
        """Compares the references of a report again. Raises UserError if they are damaged."""
        before, after = (plain[side] if isinstance(plain.get(side), Mapping) else {} for side in ("before", "after"))
        return compare(
            DriftReference.from_json(before, "the drift report (before)"),
            DriftReference.from_json(after, "the drift report (after)"),
        )

    def sentences(self) -> list[str]:
        """The report in words: what has drifted, worst first, then what has not, and what could not be compared."""
        lines = [*self.changes, *(measure.sentence for measure in self.alarms)]
        if still := [f"{one.name} ({one.shown})" for one in self.measures if one.level == "none"]:
            lines.append(f"no drift of {', '.join(still)}")
        lines += [
            f"{one.name}: with so few images, {one.shown} may be chance, which reaches {one.chance_shown}"
            for one in self.measures
            if one.level == "none" and level_of(abs(one.value), 0.0) != "none"
        ]
        return [*lines, *self.missing, *_samples(self.before, self.after)]

    def markdown(self) -> str:
        """The sentences as a list, and tables of the measures and of the layers; without a heading."""
        lines = [f"* {_escaped(sentence)}" for sentence in self.sentences()]
        if self.measures:
            lines += ["", "| measure | before | after | value | by chance | drift |", "|---|---|---|---|---|---|"]
            lines += [
                f"| {one.name} | {_escaped(one.before)} | {_escaped(one.after)} | {one.shown} | {one.chance_shown} | "
                f"{one.level} |"
                for one in self.measures
            ]
        if self.layers:
            lines += ["", "| layer | firing rate before | after | change |", "|---|---|---|---|"]
            lines += [
                f"| {_escaped(one.layer)} | {one.before:.4f} | {one.after:.4f} | {one.change:+.1%} |"
                for one in self.layers
            ]
        return "\n".join(lines) + "\n"


def measure_drift(
    before: Store | DriftReference | DataSummary,
    after: Store,
    split: str = "train",
    network: nn.Module | None = None,
    config: Config | None = None,
    *,
    images: int = 1_000,
    network_images: int = 128,
    energy_images: int = 32,
    seed: int = 0,
    progress: Count = uncounted,
) -> DriftReport:
    """Compares new data with what the champion was trained on.

    Args:
        before: the store that the champion was trained on; if it is gone, the version's reference, or its summary of
            the data.
        after: the new store.
        split: name of the split, of both stores.
        network: the champion, on any device. None: the data alone is compared.
        config: configuration of the champion.
        images: decode at most this many images of each store.
        network_images: run the champion on at most this many of each.
        energy_images: measure its energy on at most this many of each.
        seed: of the samples.
        progress: called with (images done, images to do) for each store.

    Raises:
        StoreError: a store has no such split, or an image cannot be read.
    """

    def measured(store: Store) -> DriftReference:
        return reference_of(
            store,
            split,
            network,
            config,
            images=images,
            network_images=network_images,
            energy_images=energy_images,
            seed=seed,
            progress=progress,
        )

    if isinstance(before, DataSummary):
        before = DriftReference.of_summary(before)
    return compare(measured(before) if isinstance(before, Store) else before, measured(after))


def compare(before: DriftReference, after: DriftReference) -> DriftReport:
    """Compares two references, measured with the same network or without one."""
    missing: list[str] = []
    measures = [*_classes(before, after), *_images(before, after)]
    layers: tuple[LayerChange, ...] = ()
    one, other = before.network, after.network
    if not before.images:
        missing.append(_NO_REFERENCE)
    if one is not None and other is not None:
        if one.weights == other.weights:
            layers = tuple(_layers(one, other))
            measures += [*_firing(layers), *_energy(one, other), *_calibration(one, other)]
        else:
            missing.append("firing rates, energy and calibration before are those of another network: not compared")
    elif other is not None and before.images:
        missing.append("firing rates, energy and calibration on the data before are not recorded: not compared")
    measures.sort(key=lambda measure: (-_SEVERITY[measure.level], -abs(measure.value)))
    notes = dict.fromkeys([*before.notes, *after.notes])
    changes = tuple(_changes(before, after))
    return DriftReport(before, after, tuple(measures), layers, changes, (*missing, *notes))


def _changes(before: DriftReference, after: DriftReference) -> Iterator[str]:
    if before.content_hash == after.content_hash:
        yield "the data is the same, to the bit"
    if before.split and before.split != after.split:
        yield f"compared are different splits: {before.split} before, {after.split} after"
    if before.class_names != after.class_names:
        gone = [name for name in before.class_names if name not in after.class_names]
        new = [name for name in after.class_names if name not in before.class_names]
        parts = [f"{what}: {_quoted(names)}" for what, names in (("new", new), ("gone", gone)) if names]
        yield f"the classes are others: {'; '.join(parts) or 'their order changed'}"
    if not before.distributions and before.image_shape != after.image_shape:
        yield f"images are {_size(after)} now; they were {_size(before)}"


def _classes(before: DriftReference, after: DriftReference) -> Iterator[Measure]:
    """Shares of classes, compared by name."""
    names = list(dict.fromkeys([*before.class_names, *after.class_names]))
    one, other = _by_name(before, names), _by_name(after, names)
    if not one.sum() or not other.sum():
        return
    statistic, freedom, p = chi_square(one, other)
    variation = total_variation(one, other)
    shares = one / one.sum(), other / other.sum()
    moved = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:_NAMED]
    named = [f"{names[k]!r} {shares[0][k]:.1%} to {shares[1][k]:.1%}" for k in moved if shares[0][k] != shares[1][k]]
    yield Measure(
        "class shares",
        "PSI",
        stability_index(one, other),
        chance_of_index(one, other),
        counted(int((one > 0).sum()), "class", "classes"),
        counted(int((other > 0).sum()), "class", "classes"),
        {"total_variation": variation, "chi_square": statistic, "degrees_of_freedom": freedom, "p": p},
        f", total variation {variation:.1%}, chi-square {_p(p)}{'; ' if named else ''}{', '.join(named)}",
    )


def _by_name(reference: DriftReference, names: list[str]) -> Counts:
    counts: Counter[str] = Counter()
    if reference.class_counts is None:
        return np.zeros(len(names), np.int64)
    for name, count in zip(reference.class_names, reference.class_counts, strict=True):
        counts[name] += count
    return np.array([counts[name] for name in names], np.int64)


def _images(before: DriftReference, after: DriftReference) -> Iterator[Measure]:
    """Properties of images and objects."""
    for name, shown in _SHOWN.items():
        if name not in before.distributions or name not in after.distributions:
            continue
        one, other = before.distributions[name], after.distributions[name]
        counts = np.array(one.counts, np.int64), np.array(other.counts, np.int64)
        groups = grouped(*counts)
        distance, p = kolmogorov_smirnov(*counts)
        yield Measure(
            name,
            "PSI",
            stability_index(*groups),
            chance_of_index(*groups),
            shown.format(one.mean),
            shown.format(other.mean),
            {"kolmogorov_smirnov": distance, "p": p, "mean_before": one.mean, "mean_after": other.mean},
            f", Kolmogorov-Smirnov {distance:.2f} with {_p(p)}",
        )


def _layers(one: NetworkReference, other: NetworkReference) -> Iterator[LayerChange]:
    after = {layer.layer: layer.rate for layer in other.layers}
    for layer in one.layers:
        rate, now = layer.rate, after.get(layer.layer)
        if now is None:
            continue
        chance = chance_of_change(
            (rate.std, now.std), (one.images, other.images), rate.mean, _LEAST_RATE, tries=len(one.layers)
        )
        yield LayerChange(layer.layer, rate.mean, now.mean, relative_change(rate.mean, now.mean, _LEAST_RATE), chance)


def _firing(layers: tuple[LayerChange, ...]) -> Iterator[Measure]:
    """The largest change of a layer that is above chance or, where none is, of all."""
    if not layers:
        return
    certain = [one for one in layers if abs(one.change) > one.chance]
    worst = max(certain or layers, key=lambda one: abs(one.change))
    drifted = [one for one in layers if level_of(abs(one.change), one.chance) != "none"]
    yield Measure(
        "firing rates",
        "relative change",
        worst.change,
        worst.chance,
        f"{worst.before:.4f} in layer {worst.layer}",
        f"{worst.after:.4f}",
        {"layers": len(layers), "drifted": len(drifted)},
        f"; {len(drifted)} of {counted(len(layers), 'layer')} changed by 10 % or more",
    )


def _energy(one: NetworkReference, other: NetworkReference) -> Iterator[Measure]:
    if one.energy is None or other.energy is None:
        return
    images = one.energy_images, other.energy_images
    yield Measure(
        "energy",
        "relative change",
        relative_change(one.energy.mean, other.energy.mean, _LEAST_MJ),
        chance_of_change((one.energy.std, other.energy.std), images, one.energy.mean, _LEAST_MJ),
        f"{one.energy.mean:.4g} mJ for an image",
        f"{other.energy.mean:.4g} mJ",
        {"mj_before": one.energy.mean, "mj_after": other.energy.mean},
    )


def _calibration(one: NetworkReference, other: NetworkReference) -> Iterator[Measure]:
    """The rise of the calibration error; one that falls is no drift."""
    if one.calibration is None or other.calibration is None:
        return
    parts = [_arrays(side) for side in (one.calibration, other.calibration)]
    errors = [calibration_error(*part) for part in parts]
    accuracy = [float(right.sum() / counts.sum()) for counts, _, right in parts]
    sure = [float(confidence.sum() / counts.sum()) for counts, confidence, _ in parts]
    yield Measure(
        "calibration error",
        "rise",
        max(0.0, errors[1] - errors[0]),
        chance_of_calibration(*parts[1]),
        f"{errors[0]:.1%} ({accuracy[0]:.1%} right at a mean confidence of {sure[0]:.1%})",
        f"{errors[1]:.1%} ({accuracy[1]:.1%} right at {sure[1]:.1%})",
        {"before": errors[0], "after": errors[1], "accuracy_before": accuracy[0], "accuracy_after": accuracy[1]},
    )


def _arrays(calibration: Calibration) -> tuple[Counts, np.ndarray, Counts]:
    return (
        np.array(calibration.counts, np.int64),
        np.array(calibration.confidence, np.float64),
        np.array(calibration.right, np.int64),
    )


def _samples(before: DriftReference, after: DriftReference) -> list[str]:
    if not before.images:
        return []
    sides = [f"{one.sampled:,} of {one.images:,} images {when}" for one, when in ((before, "before"), (after, "after"))]
    seeds = f"seed {after.seed}" if before.seed == after.seed else f"seeds {before.seed} and {after.seed}"
    line = f"brightness, contrast and sizes are those of {' and '.join(sides)} (sample of {seeds})"
    if before.network is not None and after.network is not None:
        line += (
            f"; the network saw {before.network.images} and {after.network.images} of them, "
            f"its energy is of {before.network.energy_images} and {after.network.energy_images}"
        )
    return [line]


def _size(reference: DriftReference) -> str:
    shape = reference.image_shape
    return "of several sizes" if shape is None else f"{shape[1]} x {shape[2]} with {counted(shape[0], 'channel')}"


def _quoted(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(repr, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _escaped(text: str) -> str:
    """Text from elsewhere, such as names of classes, as Markdown that shows it."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", one_line(text))
