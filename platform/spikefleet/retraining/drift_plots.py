"""The figure of a drift report: class shares, brightness, contrast and firing rates, before and after."""

from __future__ import annotations

from pathlib import Path

from spikefleet import plots
from spikefleet.certificates.drift_reference import EDGES, DriftReference
from spikefleet.plot_text import labels
from spikefleet.retraining.drift import DriftReport

FIGURE = "drift.png"
"""File name of the figure beside a report."""


def draw_drift(report: DriftReport, path: Path) -> None:
    """Plots what a drift report compares; a panel whose data is not known says so.

    Args:
        report: the report.
        path: the PNG.
    """
    layers = report.layers
    panels = (
        _class_panel(report.before, report.after),
        _histogram_panel(report, "brightness"),
        _histogram_panel(report, "contrast"),
        plots.BeforeAfter(
            "firing rate by layer",
            "fraction of the largest rate",
            tuple(one.layer for one in layers),
            tuple(one.before for one in layers),
            tuple(one.after for one in layers),
        ),
    )
    drifted = f" ({', '.join(measure.name for measure in report.alarms)})" if report.alarms else ""
    title = f"drift: {report.level}{drifted}" if report.measures else "drift: nothing to compare"
    plots.before_and_after(panels, title, path)


def _class_panel(before: DriftReference, after: DriftReference) -> plots.BeforeAfter:
    """Shares of the classes of both, by name."""
    names = tuple(dict.fromkeys([*before.class_names, *after.class_names]))
    if before.class_counts is None or after.class_counts is None:
        return plots.BeforeAfter("class shares", "", (), (), ())
    shares = tuple(tuple(_share(one, name) for name in names) for one in (before, after))
    return plots.BeforeAfter("class shares", "share of the labels", tuple(labels(names)), shares[0], shares[1])


def _share(reference: DriftReference, name: str) -> float:
    pairs = zip(reference.class_names, reference.class_counts or (), strict=True)
    return sum(count for own, count in pairs if own == name) / max(1, sum(reference.class_counts or ()))


def _histogram_panel(report: DriftReport, name: str) -> plots.BeforeAfter:
    """Shares of the images in bins, without bins that are empty on both sides at the ends."""
    sides = [side.distributions.get(name) for side in (report.before, report.after)]
    if sides[0] is None or sides[1] is None:
        return plots.BeforeAfter(name, "", (), (), ())
    used = [place for place, pair in enumerate(zip(sides[0].counts, sides[1].counts, strict=True)) if any(pair)]
    first, last = used[0], used[-1] + 1
    shares = [tuple(count / sum(one.counts) for count in one.counts[first:last]) for one in sides if one is not None]
    return plots.BeforeAfter(
        name, "share of the images", tuple(EDGES[name][first : last + 1].tolist()), shares[0], shares[1]
    )
