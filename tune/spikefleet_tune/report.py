"""The report of a search: its table, its metrics as JSON and CSV, and its plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikefleet_tune import plots
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.importance import METHOD, importance, importance_intervals
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult
from spikefleet_tune.space import label


def write_report(result: SearchResult, folder: Path) -> list[Path]:
    """Writes results.json, results.csv and the plots, each atomically.

    Plots that cannot be drawn (no trial with values, no second objective) are left out.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, str | bytes] = {
        "results.json": json.dumps(summary(result), indent=1, allow_nan=False) + "\n",
        "results.csv": _as_csv(result),
    }
    if result.comparable:
        content["hypervolume.png"] = plots.hypervolume_over_trials(result)
        content["parallel.png"] = plots.parallel_coordinates(result)
        if len(result.search.objectives) >= 2:
            content["front.png"] = plots.front_of_two(result)
    for name, text in content.items():
        write_atomically(folder / name, text)
    return [folder / name for name in content]


def summary(result: SearchResult) -> dict[str, Any]:
    """The whole result as plain data, the content of results.json."""
    front, knee = result.front, result.knee
    counts = dict.fromkeys(("finished", "stopped", "pruned", "failed"), 0)
    for record in result.records:
        counts[record.status] += 1
    return {
        "name": result.name,
        "search": result.search.dump(),
        "complete": result.complete,
        "hours": round(result.seconds / 3600, 4),
        "counts": counts,
        "objectives": dict(result.search.objectives),
        "front": [record.name for record in front],
        "knee": None if knee is None else knee.name,
        "reference_point": result.reference,
        "hypervolume": result.hypervolume_curve,
        "importance": importance(result),
        "importance_intervals": importance_intervals(result),
        "importance_method": METHOD,
        "trials": [_row(record) for record in result.records],
    }


def pareto_rows(result: SearchResult) -> list[dict[str, Any]]:
    """The front, best in the first objective first.

    Returns:
        For each trial: `trial` (its name), its point and its objectives by key, `status`, and `knee` (a bool).
    """
    knee = result.knee
    return [
        {
            "trial": record.name,
            **dict(record.point),
            **{name: record.metrics[name] for name in result.search.objectives},
            "status": record.status,
            "knee": knee is not None and record.number == knee.number,
        }
        for record in result.front
    ]


def pareto_table(result: SearchResult) -> list[tuple[str, ...]]:
    """The front as a table, with the knee marked in the last column; the first row is the header."""
    keys = [key for key in result.search.space if any(key in record.point for record in result.front)]
    keys = keys or sorted({key for record in result.front for key in record.point})
    objectives = result.search.objectives
    goals = (f"{name} ({direction})" for name, direction in objectives.items())
    rows: list[tuple[str, ...]] = [("trial", *(_shortest(key, keys) for key in keys), *goals, "remark")]
    for row in pareto_rows(result):
        values = (_plain(row[key]) if key in row else "-" for key in keys)
        remark = "knee" if row["knee"] else ("stopped early" if row["status"] == "stopped" else "-")
        rows.append((row["trial"], *values, *(f"{row[name]:.5g}" for name in objectives), remark))
    return rows


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The shortest suffix of a key that no other key has."""
    parts = key.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _row(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial": record.name,
        "status": record.status,
        "reason": record.reason,
        "seconds": record.seconds,
        "seed": record.seed,
        "epoch": record.epoch,
        "overrides": dict(record.overrides),
        "figures": dict(record.metrics),  # the key of results.json since the first release
        "changes": list(record.changes),
    }


def _as_csv(result: SearchResult) -> str:
    keys = sorted({key for record in result.records for key in record.overrides})
    metrics = sorted({key for record in result.records for key in record.metrics})
    front = {record.number for record in result.front}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "status", "on_front", *keys, *metrics, "seconds", "seed", "epoch", "reason"])
    for record in result.records:
        writer.writerow(
            [record.name, record.status, int(record.number in front)]
            + [_plain(record.overrides[key]) if key in record.overrides else "" for key in keys]
            + [record.metrics.get(key, "") for key in metrics]
            + [record.seconds, record.seed, "" if record.epoch is None else record.epoch, _unformulated(record.reason)]
        )
    return out.getvalue()


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _unformulated(value) if isinstance(value, str) else label(value)


def _unformulated(text: str) -> str:
    """Text that no spreadsheet evaluates as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
