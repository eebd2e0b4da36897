"""The plot of a recorded search: its first objective over the second, and over time steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spikefleet.canvas import never_fatal, save, subplots
from spikefleet.plot_text import drawable
from spikefleet.reproduction.recorded_search import RecordedSearch

_STEPS = "model.timesteps"
_COLOURS = ("#2a6f97", "#e76f51", "#2a9d8f", "#8d5a97", "#b08900", "#6c757d")


def front_plot_name(search: RecordedSearch) -> str:
    """File name of a search's plot."""
    return f"front_{search.name}.png"


def shown(name: str, value: float) -> float:
    """A value as it is shown: metrics between 0 and 1 in %, energy in uJ."""
    return value * (100 if "/" in name else 1000 if name == "energy_mj" else 1)


def draw_front(search: RecordedSearch, path: Path) -> bool:
    """Plots the first objective over the second, coloured by T, beside the first objective over T.

    Points are means over seeds, with a bar from the worst to the best; the front is a line through those of its members
    that are on it by their means, too, and the knee a ring. With one objective it is plotted over trials.

    Args:
        search: with any number of objectives.
        path: the PNG.

    Returns:
        Whether it was drawn.
    """
    return _front(search, path)


@never_fatal
def _front(search: RecordedSearch, path: Path) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    first, second, *_ = [*search.objectives, None]
    steps = sorted({trial.point[_STEPS] for trial in search.trials if _STEPS in trial.point})
    columns = 2 if steps else 1
    figure, axes = subplots(1, columns, figsize=(5.6 * columns, 4.4), layout="constrained", squeeze=False)
    left = axes.flat[0]
    colours = {step: _COLOURS[i % len(_COLOURS)] for i, step in enumerate(steps)}
    places = {
        trial.name: (number if second is None else shown(second, trial.mean(second)), shown(first, trial.mean(first)))
        for number, trial in enumerate(search.trials)
    }
    for trial in search.trials:
        colour = colours.get(trial.point.get(_STEPS), _COLOURS[-1])
        y = [shown(first, value) for value in trial.values(first)]
        left.plot(*places[trial.name], "o", ms=5, color=colour)
        if len(y) > 1:
            left.plot([places[trial.name][0]] * 2, (min(y), max(y)), "-", lw=1, color=colour)
        if steps and _STEPS in trial.point:
            place = steps.index(trial.point[_STEPS])
            axes.flat[1].plot([place + 0.05 * i for i in range(len(y))], y, "o", ms=3, color=colour)
    if second is not None:
        least = search.objectives[second] == "min"
        line = _undominated([places[trial.name] for trial in search.best_known_front], search.objectives[first], least)
        left.step(*zip(*line, strict=True), where="post" if least else "pre", color="black", lw=1, label="front")
    if search.knee in places:
        left.plot(*places[search.knee], "o", ms=13, mfc="none", mec="#cf222e", mew=1.5, label="knee in the search")
    for step, colour in colours.items():
        left.plot([], [], "o", color=colour, label=f"T = {step}")
    left.set(xlabel="trial" if second is None else _label(second), ylabel=_label(first))
    if second is not None:
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.xaxis.set_minor_locator(NullLocator())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    if steps:
        axes.flat[1].set(xlabel="time steps T", ylabel=_label(first), xticks=range(len(steps)), xticklabels=steps)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(drawable(search.name), fontsize=9)
    save(figure, path)


def _undominated(points: Sequence[tuple[float, float]], first: str, least: bool) -> list[tuple[float, float]]:
    """The points (second, first objective) that no other one betters in both, by the second objective."""
    sign = 1 if first == "max" else -1
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0] if least else -point[0], -sign * point[1])):
        if not found or sign * y > sign * found[-1][1]:
            found.append((x, y))
    return sorted(found)


def _label(name: str) -> str:
    return {"energy_mj": "energy of one input, uJ", "latency_ms": "latency, ms"}.get(name, f"{name}, %")
