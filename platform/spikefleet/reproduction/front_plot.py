"""The plot of a recorded search: its first objective over the second, and over time steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spikefleet.canvas import never_fatal, save, subplots
from spikefleet.plot_text import drawable
from spikefleet.reproduction.recorded_search import RecordedSearch, RecordedTrial

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

    Where all points have further seeds, they are means, with a bar from the worst to the best. Else they are values in
    the search, and the means of the other seeds stand beside as hollow points. The front is a line, the knees are
    rings. With one objective it is plotted over trials.

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
    confirmed = search.seeds[0] > 1
    places = {trial.name: _place(search, trial, number, confirmed) for number, trial in enumerate(search.trials)}
    for number, trial in enumerate(search.trials):
        colour, place = colours.get(trial.point.get(_STEPS), _COLOURS[-1]), places[trial.name]
        y = [shown(first, value) for value in trial.values(first)]
        left.plot(*place, "o", ms=5, color=colour)
        if confirmed:
            left.plot([place[0]] * 2, (min(y), max(y)), "-", lw=1, color=colour)
        elif trial.others:
            others = _place(search, replace(trial, metrics=trial.others[0], others=trial.others[1:]), number, True)
            left.plot(*zip(place, others, strict=True), "-", lw=0.7, color=colour, alpha=0.6)
            left.plot(*others, "o", ms=5, mfc="white", color=colour)
        if steps and _STEPS in trial.point:
            at = steps.index(trial.point[_STEPS])
            axes.flat[1].plot([at + 0.05 * i for i in range(len(y))], y, "o", ms=3, color=colour)
    if second is not None:
        line = sorted(places[trial.name] for trial in search.best_known_front)
        where = "post" if search.objectives[second] == "min" else "pre"
        left.step(*zip(*line, strict=True), where=where, color="black", lw=1, label="front")
    if not confirmed and search.seeds[1] > 1:
        left.plot([], [], "o", ms=5, mfc="white", color="black", label="mean of the other seeds")
    for name, edge, of in ((search.knee, "#cf222e", "in the search"), (search.knee_by_others, "#1a7f37", "by others")):
        if name in places:
            left.plot(*places[name], "o", ms=13 if of == "in the search" else 17, mfc="none", mec=edge, mew=1.5)
            left.plot([], [], "o", ms=9, mfc="none", mec=edge, mew=1.5, label=f"knee {of}")
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


def _place(search: RecordedSearch, trial: RecordedTrial, number: int, mean: bool) -> tuple[float, float]:
    """(second, first objective) of a trial: means over its seeds, or values in the search; its number for no second."""
    first, second, *_ = [*search.objectives, None]

    def value(name: str) -> float:
        return shown(name, trial.mean(name) if mean else trial.metrics[name])

    return (number if second is None else value(second), value(first))


def _label(name: str) -> str:
    return {"energy_mj": "energy of one input, uJ", "latency_ms": "latency, ms"}.get(name, f"{name}, %")
