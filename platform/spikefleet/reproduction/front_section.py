"""The section of a recorded search on the page of evidence: its front, what decides it, what other seeds say of it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikefleet.reproduction.front_plot import shown
from spikefleet.reproduction.recorded_search import RecordedSearch, RecordedTrial
from spikefleet.reproduction.training_time import words_of
from spikefleet_tune.messages import counted

_ALL_OF = 12
"""A search with so many trials or fewer is shown whole."""


def front_section(one: RecordedSearch, image: str, results: str) -> Iterator[str]:
    """The lines of a search.

    Args:
        one: the search.
        image: the line of its plot.
        results: directory of the recorded results, for the command.
    """
    fewest, most = one.seeds
    confirmed = fewest > 1
    whole = len(one.trials) <= _ALL_OF
    yield f"## The front of `{' '.join(one.words)}`"
    yield ""
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {counted(most, 'seed')}"
    yield (
        f"Recipe `{one.recipe}`, {counted(len(one.trials), 'trial')} with {seeds} each, {words_of(one.seconds)} of "
        f"training; data {one.dataset} ({one.data_hash[:12]}), code {', '.join(one.code_versions)}. "
        f"Command: `{_command(one, results)}`."
    )
    yield ""
    by = "means over all seeds" if confirmed else "one training of each point"
    head = f"The front is by {by}; {len(one.best_known_front)} of {counted(len(one.trials), 'trial')} are on it."
    if not confirmed and most > 1:
        head += (
            " What was best of many by one seed is partly luck: the means with other seeds, which had no part in the "
            "search, stand in brackets. The knee by these means is chosen among them, so its own is a little flattered."
        )
    if one.without_values:
        head += f" Left out: {counted(one.without_values, 'trial')} without the objectives."
    yield head
    yield ""
    yield from _table(one, list(one.trials) if whole else one.best_known_front)
    yield ""
    yield from _importance(one)
    yield ""
    yield image


def front_verdict(one: RecordedSearch) -> dict[str, Any]:
    """The front as plain data."""
    return {
        "search": one.name,
        "front": [trial.name for trial in one.best_known_front],
        "knee": one.knee,
        "registered": None if one.registered is None else dict(one.registered),
        "trials": len(one.trials),
        "seeds": list(one.seeds),
    }


def _command(one: RecordedSearch, results: str) -> str:
    fewest, most = one.seeds
    words = ["spikefleet", "tune", *one.words, "--trials", str(len(one.trials) + one.without_values)]
    words += ["--name", one.name] if one.name != Path(one.words[0]).stem else []
    words += ["--confirm", str(most - 1)] if most > 1 else []
    words += ["--confirm-all"] if fewest > 1 else []
    if one.registered is not None:
        trial = one.registered["trial"]
        words += ["--register", "knee" if trial == (one.knee_by_others or one.knee) else trial]
    return shlex.join([*words, "--results", results])


def _table(one: RecordedSearch, rows: list[RecordedTrial]) -> Iterator[str]:
    keys = [key for key in one.keys if any(key in trial.point for trial in rows)]
    first = next(iter(one.objectives))
    test = first.replace("val/", "test/") if first.startswith("val/") else None
    metrics = [*one.objectives, *([test] if test is not None and any(test in trial.metrics for trial in rows) else [])]
    yield f"| trial | {' | '.join(key.rsplit('.', 1)[-1] for key in keys)} | {' | '.join(map(_title, metrics))} | |"
    yield f"|{' --- |' * (len(keys) + len(metrics) + 2)}"
    on_front = {trial.name for trial in one.best_known_front}
    last = list(one.objectives)[-1]
    by_mean = one.seeds[0] > 1
    for trial in sorted(rows, key=lambda trial: trial.mean(last) if by_mean else trial.metrics[last]):
        remarks = ["front"] if trial.name in on_front and len(on_front) < len(rows) else []
        remarks += ["knee in the search"] if trial.name == one.knee else []
        remarks += ["knee by the other seeds"] if trial.name == one.knee_by_others else []
        if one.registered is not None and one.registered["trial"] == trial.name:
            remarks.append(f"registered as {one.registered['name']} version {one.registered['version']}")
        point = (_plain(trial.point.get(key)) for key in keys)
        cells = (trial.name.rsplit("-", 1)[-1], *point, *(_cell(one, trial, name) for name in metrics))
        yield f"| {' | '.join(cells)} | {', '.join(remarks)} |"


def _cell(one: RecordedSearch, trial: RecordedTrial, name: str) -> str:
    """The mean where all points have as many seeds; else the value in the search, with the mean of the others."""
    if one.seeds[0] > 1:
        return _mean(name, trial.values(name))
    value = f"{shown(name, trial.metrics[name]):.4g}" if name in trial.metrics else "-"
    others = [metrics[name] for metrics in trial.others if name in metrics]
    return f"{value} ({_mean(name, others)})" if others else value


def _mean(name: str, values: list[float]) -> str:
    values = [shown(name, value) for value in values]
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def _importance(one: RecordedSearch) -> Iterator[str]:
    """A table of shares where there are any, and the reasons where there are none."""
    shares = {name: found for name, found in one.importance.items() if not isinstance(found, str)}
    if shares:
        keys = sorted({key for found in shares.values() for key in found}, key=lambda key: -_most(shares, key))
        yield f"| share of the variance of | {' | '.join(key.rsplit('.', 1)[-1] for key in keys)} |"
        yield f"|{' --- |' * (len(keys) + 1)}"
        for name, found in shares.items():
            cells = []
            for key in keys:
                low, high = one.intervals.get(name, {}).get(key, (found.get(key, 0.0), found.get(key, 0.0)))
                cells.append(f"{found[key]:.0%} ({low:.0%} to {high:.0%})" if key in found else "-")
            yield f"| {_title(name)} | {' | '.join(cells)} |"
        yield ""
        yield f"By {one.method}; over {'all trainings' if one.seeds[0] > 1 else 'one training of each point'}."
        left = [key.rsplit(".", 1)[-1] for key in one.keys if not any(key in found for found in shares.values())]
        if left:
            yield f"Not estimated, for only some points have them: {', '.join(left)}."
    for name, reason in one.importance.items():
        if isinstance(reason, str):
            yield f"What decides {_title(name)}: not computed, {reason}."


def _most(shares: dict[str, Any], key: str) -> float:
    return max(float(found.get(key, 0.0)) for found in shares.values())


def _title(name: str) -> str:
    unit = {"energy_mj": "energy, uJ", "latency_ms": "latency, ms"}.get(name, name)
    return f"{unit}, %" if "/" in name else unit


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)
