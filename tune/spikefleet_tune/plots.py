"""Plots of a search as PNG: the Pareto front, the hypervolume over trials, and parallel coordinates.

The README says under "Findings" why they are not Optuna's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult
from spikefleet_tune.space import label

_MOST_TICKS = 12


def front_of_two(result: SearchResult) -> bytes:
    """Plots the first objective over the second: dominated trials in grey, the front as steps, the knee circled.

    Args:
        result: has at least two objectives.

    Returns:
        A PNG.
    """
    (y, y_way), (x, x_way) = list(result.search.objectives.items())[:2]
    figure, axes = _canvas(7, 5)
    front, knee = result.front, result.knee
    on_front = {record.number for record in front}
    behind = [record for record in result.comparable if record.number not in on_front]
    axes.scatter(_column(behind, x), _column(behind, y), color="0.75", s=24, label=f"dominated ({len(behind)})")
    line = sorted(front, key=lambda one: (one.metrics[x], one.metrics[y]))
    if len(result.search.objectives) == 2:
        # What can be had at a price is the best up to there.
        where = "post" if x_way == "min" else "pre"
        axes.step(_column(line, x), _column(line, y), where=where, color="tab:blue", linewidth=1)
    axes.scatter(_column(line, x), _column(line, y), color="tab:blue", s=36, zorder=3, label=f"front ({len(line)})")
    if knee is not None:
        axes.scatter(
            [knee.metrics[x]],
            [knee.metrics[y]],
            s=180,
            facecolors="none",
            edgecolors="tab:red",
            linewidths=2,
            label="knee",
        )
    for record in line:
        spot = (record.metrics[x], record.metrics[y])
        axes.annotate(f"{record.number}", spot, textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.set_xlabel(_title(x, x_way))
    axes.set_ylabel(_title(y, y_way))
    axes.set_title(result.name)
    axes.legend(loc="best", fontsize=8)
    return _png(figure)


def hypervolume_over_trials(result: SearchResult) -> bytes:
    """Plots the hypervolume after each trial, as a fraction of the final one. Returns a PNG."""
    figure, axes = _canvas(7, 3.5)
    curve = result.hypervolume_curve
    whole = curve[-1] if curve and curve[-1] > 0 else 1.0
    axes.step(range(1, len(curve) + 1), [value / whole for value in curve], where="post", color="tab:blue")
    axes.set_xlabel("trials")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("hypervolume / final")
    axes.set_ylim(0, 1.05)
    reference = ", ".join(f"{value:.4g}" for value in result.reference or ())
    axes.set_title(f"{result.name}: final {curve[-1] if curve else 0:.4g}, reference point ({reference})", fontsize=9)
    return _png(figure)


def parallel_coordinates(result: SearchResult) -> bytes:
    """Plots a line for each trial with values, over keys and objectives, coloured by the first objective: a PNG."""
    trials = result.comparable
    keys = list(result.search.space) or sorted({key for record in trials for key in record.point})
    objectives = list(result.search.objectives)
    columns = [_scaled([record.point.get(key) for record in trials]) for key in keys]
    columns += [_scaled([record.metrics[name] for record in trials]) for name in objectives]
    figure, axes = _canvas(max(6.0, 1.6 * len(columns)), 4.5)
    first = [record.metrics[objectives[0]] for record in trials]
    norm, colours = (
        Normalize(min(first), max(first) if max(first) > min(first) else min(first) + 1),
        colormaps["viridis"],
    )
    on_front = {record.number for record in result.front}
    for i, record in enumerate(trials):
        ahead = record.number in on_front
        axes.plot(
            range(len(columns)),
            [heights[i] for heights, _ in columns],
            color=colours(norm(first[i])),
            linewidth=2 if ahead else 0.8,
            alpha=1.0 if ahead else 0.5,
        )
    for position, (_, ticks) in enumerate(columns):
        axes.axvline(position, color="0.6", linewidth=0.8)
        for height, text in ticks:
            axes.annotate(text, (position, height), textcoords="offset points", xytext=(3, 0), fontsize=7)
    axes.set_xticks(range(len(columns)), [*keys, *objectives], rotation=20, ha="right", fontsize=8)
    axes.set_yticks([])
    axes.set_title(f"{result.name}: the front is drawn thick", fontsize=9)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=objectives[0])
    return _png(figure)


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _title(name: str, direction: str) -> str:
    return f"{name} ({'more' if direction == 'max' else 'less'} is better)"


def _column(records: Sequence[TrialRecord], name: str) -> list[float]:
    return [record.metrics[name] for record in records]


def _scaled(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] with tick labels: numbers to scale, other values in even steps, absent ones below 0."""
    present = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
    known: list[Any] = sorted(set(present)) if numbers else sorted({label(value) for value in present})
    if numbers and len(known) > _MOST_TICKS:
        low, high = known[0], known[-1]
        logarithmic = low > 0 and high / low > 50

        def height(value: Any) -> float:
            if logarithmic:
                return math.log(value / low) / math.log(high / low)
            return float((value - low) / (high - low))

        ticks = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    else:
        steps = {value: i / max(1, len(known) - 1) for i, value in enumerate(known)}

        def height(value: Any) -> float:
            return steps[value if numbers else label(value)]

        ticks = [(step, f"{value:.4g}" if numbers else str(value).strip('"')) for value, step in steps.items()]
    heights = [-0.1 if value is None else height(value) for value in values]
    return heights, [*ticks, (-0.1, "absent")] if len(present) < len(values) else ticks
