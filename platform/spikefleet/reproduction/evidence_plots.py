"""Plots of evidence: differences by seed and the paper's, firing rates, gradients over depth. Every file is a PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spikefleet.canvas import never_fatal, save, subplots
from spikefleet.plot_text import drawable
from spikefleet.reproduction.depth_gradients import DepthGradients
from spikefleet.reproduction.evidence import TableEvidence
from spikefleet.reproduction.verdict import JudgedPair
from spikefleet_models.gradient_flow import TRAINABLE

_COLOURS = {"shown": "#1a7f37", "reversed": "#cf222e", "open": "#6c757d", "not run": "#c9a227"}


_CURVES = 6
"""At most in one panel of firing rates."""

GRADIENTS_PLOT = "depth_gradients.png"
"""File name of the plot of gradients over depth."""


def plot_name(evidence: TableEvidence, what: str = "") -> str:
    """File name of a table's plot."""
    return f"{evidence.table.name}_{evidence.scale}{f'_{what}' if what else ''}.png"


def has_rates(evidence: TableEvidence) -> bool:
    """Whether trainings of a table have energy cards, with the firing rates of their layers."""
    return any(training.card is not None for rows in evidence.trainings.values() for training in rows)


def has_courses(evidence: TableEvidence) -> bool:
    """Whether trainings of a table have side branches, whose balance coefficient is plotted."""
    return bool(_courses(evidence))


def draw_evidence(evidence: TableEvidence, folder: Path) -> list[Path]:
    """Plots what was run of a table.

    Args:
        evidence: of one table and scale.
        folder: of the plots.

    Returns:
        The paths of those that could be drawn; none where nothing was run.
    """
    drawn = []
    for name in plot_names(evidence):
        path, title = folder / name, f"{evidence.table.paper}; scale {evidence.scale}"
        if name == plot_name(evidence):
            done = draw_differences(evidence, path)
        else:
            done = _training(_rates(evidence), _courses(evidence), title, path)
        drawn += [path] if done else []
    return drawn


def plot_names(evidence: TableEvidence) -> list[str]:
    """File names of the plots of a table; none where nothing was run."""
    if not evidence.was_run:
        return []
    return [plot_name(evidence), *([plot_name(evidence, "training")] if has_rates(evidence) else [])]


def _rates(evidence: TableEvidence) -> dict[str, list[float]]:
    """Mean firing rate of each layer that spikes feed, in network order, by row; over the seeds of the row."""
    found = {}
    for name, trainings in evidence.trainings.items():
        cards = [training.card for training in trainings if training.card is not None]
        rates = [[row["rate"] for row in card.rows() if row["rate"] is not None] for card in cards]
        if rates and len({len(one) for one in rates}) == 1 and rates[0]:
            found[name] = [float(value) for value in np.mean(rates, axis=0)]
    return found


def _courses(evidence: TableEvidence) -> dict[str, list[tuple[float, float]]]:
    """(epoch, balance coefficient) of the rows with side branches; it is the same for all seeds."""
    key, found = "balance_coefficient", {}
    for name, trainings in evidence.trainings.items():
        if trainings and (course := [(row["epoch"], row[key]) for row in trainings[0].history if key in row]):
            found[name] = course
    return found


@never_fatal
def _training(
    rates: Mapping[str, Sequence[float]], courses: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path
) -> None:
    names = list(rates)
    each = math.ceil(len(names) / math.ceil(len(names) / _CURVES))
    panels = [names[start : start + each] for start in range(0, len(names), each)]
    columns = len(panels) + bool(courses)
    figure, axes = subplots(1, columns, figsize=(5.6 * columns, 5.0), layout="constrained", squeeze=False)
    top = max(max(values) for values in rates.values())
    for axis, shown in zip(axes.flat, panels, strict=False):
        for name in shown:
            label = f"{drawable(name)}: mean {np.mean(rates[name]):.3f}"
            axis.plot(np.linspace(0, 1, len(rates[name])), rates[name], marker=".", ms=3, lw=1, label=label)
        axis.set(xlabel="layers that spikes feed, from the first (0) to the last (1)", ylim=(0, 1.05 * top))
    axes.flat[0].set_ylabel("firing rate, mean over seeds")
    if courses:
        right = axes.flat[-1]
        alike: dict[tuple[tuple[float, float], ...], list[str]] = {}
        for name, points in courses.items():
            alike.setdefault(tuple(points), []).append(drawable(name))
        for points, named in alike.items():  # lines of equal courses would hide one another
            right.plot(*zip(*points, strict=True), marker=".", ms=3, lw=1, label="\n".join(named))
        right.set(xlabel="epoch", ylabel="balance coefficient")
        right.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(drawable(title), fontsize=9)
    save(figure, path)


def draw_gradients(gradients: DepthGradients, path: Path) -> bool:
    """Plots the first layer's gradient over depth, without and with side branches; returns whether it was drawn.

    Args:
        gradients: by depth.
        path: the PNG.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {"without side branches": {}, "with side branches": {}}
    for (connection, branches), by_depth in gradients.ratios().items():
        panels["with side branches" if branches else "without side branches"][connection] = by_depth
    return _over_depth(panels, path)


@never_fatal
def _over_depth(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    figure, axes = subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), layout="constrained", sharey=True)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        within = f"{TRAINABLE[0]:g} to {TRAINABLE[1]:g}: neither vanishes nor explodes"
        axis.axhspan(*TRAINABLE, color="#1a7f37", alpha=0.08, label=within)
        for name, by_depth in curves.items():
            axis.plot(list(by_depth), list(by_depth.values()), marker="o", ms=4, label=drawable(name))
        axis.set(title=title, xlabel="weight layers", yscale="log")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("gradient norm, first layer / last layer")
    axes.flat[0].legend(fontsize=8)
    save(figure, path)


def draw_differences(evidence: TableEvidence, path: Path) -> bool:
    """Plots all pairs of a table's claims, one panel per column; returns whether they were drawn.

    Args:
        evidence: of one table and scale.
        path: the PNG.
    """
    panels: dict[str, list[tuple[str, JudgedPair]]] = {}
    for one in evidence.claims:
        column = evidence.table.columns[one.claim.column]
        unit = "points" if column.unit == "%" else column.unit
        rows = panels.setdefault(f"difference in {column.label}, {unit}", [])
        rows += [(f"{pair.rows.first} against {pair.rows.second}", pair) for pair in one.pairs]
    return _differences(panels, f"{evidence.table.paper}; scale {evidence.scale}", path)


@never_fatal
def _differences(panels: Mapping[str, Sequence[tuple[str, JudgedPair]]], title: str, path: Path) -> None:
    from matplotlib.ticker import NullLocator

    rows = max(map(len, panels.values()))
    size = (7.2 * len(panels), 1.8 + 0.36 * rows)
    figure, axes = subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, pairs) in zip(axes.flat, panels.items(), strict=True):
        axis.axvline(0.0, color="black", lw=0.8)
        for place, (_, pair) in enumerate(pairs):
            if pair.paper is not None and "points" in label:  # energy is another network's
                axis.plot(pair.paper, place, "D", color="#e76f51", markersize=5)
            if pair.ours is not None:
                colour = _COLOURS[pair.found]
                seeds = pair.ours.differences
                axis.plot(seeds, np.full(len(seeds), place + 0.18), "o", color=colour, markersize=3, alpha=0.6)
                if pair.ours.interval is not None:
                    axis.plot(pair.ours.interval, (place, place), "-", color=colour, lw=2)
                axis.plot(pair.ours.difference, place, "|", color=colour, markersize=12, markeredgewidth=2)
        axis.plot([], [], "D", color="#e76f51", markersize=5, label="the paper's, on its own data")
        axis.plot([], [], "o", color="#6c757d", markersize=3, label="ours by seed")
        for found in ("shown", "reversed", "open"):
            axis.plot([], [], "-", color=_COLOURS[found], lw=2, label=f"ours, 95 % interval: {found}")
        axis.plot([], [], "o", color=_COLOURS["not run"], markersize=3, label="one seed, not judged")
        axis.set_yticks(range(len(pairs)), [drawable(name) for name, _ in pairs], fontsize=7)
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        linear = _linear(pairs, "points" in label)
        axis.set(xlabel=f"{label}\nlinear to +-{linear:.2g}, then logarithmic")
        axis.set_xscale("symlog", linthresh=linear)
        axis.set_xticks(ticks := _ticks(linear, *axis.get_xlim()), [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(drawable(title), fontsize=9)
    save(figure, path)


def _linear(pairs: Sequence[tuple[str, JudgedPair]], with_papers: bool) -> float:
    """Up to which difference the axis is linear: a network that does not train differs by more than all others."""
    values = [abs(value) for _, pair in pairs for value in _all(pair, with_papers) if value]
    return max(float(np.median(values)), max(values) / 10, 1e-9) if values else 1.0


def _ticks(linear: float, least: float, most: float) -> list[float]:
    """Round numbers on both sides of 0, two in the linear part and one a factor of about 3 or more beyond it."""
    places = [linear / 2, linear]
    while places[-1] < max(-least, most):
        places.append(places[-1] * math.sqrt(10))
    rounded = sorted({float(f"{place:.1g}") for place in places})
    return [sign * place for sign in (-1, 1) for place in rounded if least <= sign * place <= most] + [0.0]


def _all(pair: JudgedPair, with_papers: bool) -> Iterator[float]:
    if pair.paper is not None and with_papers:
        yield pair.paper
    if pair.ours is not None:
        yield from pair.ours.differences
