"""What MLflow's pages say about a search: its experiment, its trials and its front in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spikefleet.tracking.mlflow_pages import RunListView, experiment_page, without_link_targets
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.ledger import TrialStart
from spikefleet_tune.messages import counted
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import Search

_SHORT = {"model.timesteps", "model.neuron.bound"}  # shown as T and D
_MOST_COLUMNS = 6
_MOST_ROWS = 30


def search_experiment(name: str, search: Search) -> dict[str, str]:
    """Tags of the experiment that holds the trials of a search."""
    varied = [key for key in search.space if key not in _SHORT][:_MOST_COLUMNS]
    first, direction = next(iter(search.objectives.items()))
    view = RunListView(
        "Trials",
        "Trials with objectives, T, D, parameters and data set",
        tuple(dict.fromkeys([*search.objectives, "energy_mj"])),
        ("T", "D", *varied),
        only=f"tags.search = '{name}'",
        order_by=first,
        ascending=direction == "min",
    )
    return experiment_page(f"Trials of search {name} over recipe {search.recipe}.", view)


def search_description(name: str, search: Search, result: SearchResult | None = None) -> str:
    """The description of a search; its first line is the same before and after it."""
    goals = ", ".join(f"{key} ({direction})" for key, direction in search.objectives.items())
    lines = [f"Search {name} over recipe {search.recipe}.", ""]
    if result is not None:
        ended = "" if result.complete else "; not complete, the same command resumes it"
        knee = "" if result.knee is None else f"; the knee is {result.knee.name}"
        front = f"**Pareto front: {counted(len(result.front), 'trial')} of {len(result.records)}{knee}{ended}**"
        lines += [front, *_front(search, result), ""]
    lines.append(f"* Objectives: {goals}.")
    lines.append(f"* Space: {', '.join(f'`{key}`' for key in search.space) or 'listed points'}.")
    lines.append(f"* Sampler {search.sampler.kind}, scheduler {search.scheduler.kind}.")
    return "\n".join(lines) + "\n"


def _front(search: Search, result: SearchResult) -> Iterator[str]:
    if not result.front:
        return
    yield ""
    yield f"| trial | {' | '.join(search.objectives)} | point |"
    yield f"|---|{'---|' * len(search.objectives)}---|"
    for record in result.front[:_MOST_ROWS]:
        values = [_plain(record.metrics.get(key)) for key in search.objectives]
        point = ", ".join(f"{key}={_plain(value)}" for key, value in record.point.items())
        yield f"| {record.name} | {' | '.join(values)} | {point} |"


def trial_description(search_name: str, trial: TrialStart | TrialRecord) -> str:
    """The description of a trial; its first line is the same before and after it."""
    lines = [f"Trial {trial.number} of search {search_name}.", ""]
    if isinstance(trial, TrialRecord):
        lines.append(f"* Status: {trial.status}{f', {without_link_targets(trial.reason)}' if trial.reason else ''}.")
        lines.extend(_table("metric", trial.metrics))
    lines.extend(_table("parameter", trial.point))
    return "\n".join(lines) + "\n"


def _table(what: str, values: Mapping[str, object]) -> Iterator[str]:
    if values:
        yield ""
        yield f"| {what} | value |"
        yield "|---|---|"
        yield from (f"| {key} | {_plain(value)} |" for key, value in values.items())


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return str(value).replace("|", "\\|")
