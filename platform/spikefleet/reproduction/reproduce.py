"""Reproduces a table of a paper: trains its rows with several seeds and compares the results with the paper's.

All rows of a recipe and scale, of every table, are trials of one search, `paper-SCALE-RECIPE`: tables share trainings,
and further seeds extend the search. With a directory of recorded results, the trainings in it are not run again, though
their runs are elsewhere; new ones are added to it after each search, also if it is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.reproduction.plan import ReproductionPlan, distinct_trainings, short_digest
from spikefleet.reproduction.results import SUFFIX, Training, add_results, read_results, setting_of
from spikefleet.reproduction.rows import (
    ReproducedRow,
    Reproduction,
    cells_of,
    data_shown,
    measured_row,
)
from spikefleet.reproduction.table import Entry
from spikefleet.reproduction.trained import trainings_of
from spikefleet.reproduction.training_time import time_line
from spikefleet.runs.options import Options
from spikefleet.search.mlflow_observer import FLUSH_S
from spikefleet.search.run_search import read_tracked_search, run_tracked_search
from spikefleet.status import print_line
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.mlflow_pages import KIND, MODEL_TRAINING, NOTE
from spikefleet.tracking.tracker import Tracker
from spikefleet.versions import code_version
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_tune.messages import counted
from spikefleet_tune.search_file import search_of


@dataclass(frozen=True)
class _Group:
    """The trainings of the rows of one recipe."""

    recipe: str
    rows: Sequence[Entry]
    search: str
    """Name of the search that they are trials of."""
    points: Mapping[str, Mapping[str, Any]]
    """The point of each training in the search, by digest."""
    wanted: Mapping[str, str]
    """The setting of each training by digest."""
    known: Mapping[str, Training] = field(default_factory=dict)
    """Finished trainings by digest."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """By digest, why a trial has no result."""
    searched: bool = False
    """Whether the search exists here."""

    @classmethod
    def of(cls, plan: ReproductionPlan, recipe: str, rows: Sequence[Entry], options: Options) -> Self:
        """The group as recorded results and the runs directory have it."""
        name = f"paper-{plan.scale}-{recipe}" + (f"-{short_digest(plan.data)}" if plan.data else "")
        points: dict[str, Mapping[str, Any]] = {}
        wanted: dict[str, str] = {}
        for point, config in distinct_trainings(plan, rows):
            digest = config.digest()
            points[digest], wanted[digest] = point, setting_of(config)
        return cls(recipe, rows, name, points, wanted).read(plan, options)

    def read(self, plan: ReproductionPlan, options: Options) -> Self:
        """The group with what was trained meanwhile."""
        recorded = {} if plan.results is None else read_results(self.file(plan.results))
        result = read_tracked_search(self.search, options)
        if result is None:
            return replace(self, known=recorded, problems={}, searched=False)
        trainings, problems = trainings_of(result, options, self.wanted.keys() - recorded.keys())
        return replace(self, known={**trainings, **recorded}, problems=problems, searched=True)

    def file(self, results: Path) -> Path:
        """Where its results are recorded."""
        return results / f"{self.search}{SUFFIX}"


def reproduce(plan: ReproductionPlan, options: Options, console: Console) -> Reproduction:
    """Trains the missing rows and collects the table; after an interruption the same call resumes.

    A row whose data is missing, or whose search is invalid, is left out with the reason, unless no row is left.

    Args:
        plan: what to reproduce.
        options: directories and cluster.
        console: for progress.

    Returns:
        The table with our results.

    Raises:
        UserError: a pattern matches no row, no row can run at the scale, or a search is invalid.
        SourceError: the data of all rows is missing.
        StoreError: the stores of all rows are missing or damaged.
    """
    entries = list(plan.table.entries(plan.only))
    if not entries:
        known = ", ".join(entry.full_name for entry in plan.table.entries())
        raise UserError(f"--only {plan.only!r} matches no row of {plan.table.name}; expected one of {known}")
    by_recipe: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.group.refusal(entry.row, plan.scale) is None:
            by_recipe.setdefault(entry.group.scales[plan.scale].recipe, []).append(entry)
    if not by_recipe and not any(column.origin == "network" for column in plan.table.columns.values()):
        reasons = "; ".join(dict.fromkeys(filter(None, (e.group.refusal(e.row, plan.scale) for e in entries))))
        raise UserError(f"no row of {plan.table.name} can run at scale {plan.scale}: {reasons}")
    placed = [key for key in options.data if key in ("data.root", "data.store")]
    if len(by_recipe) > 1 and placed:
        several = ", ".join(dict.fromkeys(entry.group.name for rows in by_recipe.values() for entry in rows))
        raise UserError(
            f"{placed[0]} names one data set, but these rows need several ({several}); select rows with --only "
            "'GROUP*', or prepare each store in the stores directory first (`spikefleet data prepare`)"
        )
    groups: dict[str, _Group] = {}
    missing: dict[str, str] = {}

    @contextmanager
    def leaving_out(recipe: str) -> Iterator[None]:
        try:
            yield
        except (SourceError, StoreError, UserError) as error:
            if len(missing) + 1 == len(by_recipe):  # no row is left
                raise
            missing[recipe] = str(error)
            print_line(console, f"left out {by_recipe[recipe][0].group.name}: {error}")

    for recipe, rows in by_recipe.items():
        with leaving_out(recipe):
            groups[recipe] = _Group.of(plan, recipe, rows, options)
    for recipe in [recipe for recipe in groups if plan.train]:
        print_line(console, time_line(groups.values()))
        with leaving_out(recipe):
            groups[recipe] = _trained(plan, groups[recipe], options, console)
    found: list[ReproducedRow] = []
    for entry in entries:
        reason = entry.group.refusal(entry.row, plan.scale)
        recipe = "" if reason is not None else entry.group.scales[plan.scale].recipe
        reason = missing.get(recipe) if reason is None else reason
        if reason is None and (groups[recipe].known or groups[recipe].searched):
            found.append(measured_row(plan, entry, groups[recipe].known, groups[recipe].problems))
        else:
            data, same = data_shown(plan, entry, []) if recipe else ("", False)
            cells = cells_of(plan.table, entry, [], same)
            remark = f"not run: {reason or 'nothing was trained yet'}"
            found.append(ReproducedRow(entry, cells, remark=remark, data=data, same_data=same))
    if plan.train and groups:
        print_line(console, time_line(groups.values()))
    return Reproduction(plan, tuple(found))


def _trained(plan: ReproductionPlan, group: _Group, options: Options, console: Console) -> _Group:
    """The group after training what is missing, and recording it."""
    # Without a record the search is asked for all of them: it knows which it has, and which have failed.
    points = [point for digest, point in group.points.items() if plan.results is None or digest not in group.known]
    if not points:
        return _recorded(plan, group, console)
    scaling = group.rows[0].group.scales[plan.scale]
    chosen = load_config(group.recipe).checkpoint
    tree = {
        "recipe": group.recipe,
        "overrides": plan.data_of(group.rows[0]),
        "sampler": "listed",
        "points": points,
        "objectives": {f"val/{chosen.metric}": chosen.mode},
        "resources": {**scaling.resources.model_dump(), **(plan.resources or {})},
    }
    try:
        run_tracked_search(search_of(tree), group.search, options, console, retry_failed=plan.retry_failed)
    finally:  # also what was finished before an interruption
        group = _recorded(plan, group.read(plan, options), console)
    return group


def _recorded(plan: ReproductionPlan, group: _Group, console: Console) -> _Group:
    """The group, after recording its trainings if the plan says so."""
    if plan.results is not None:
        file = group.file(plan.results)
        if added := add_results(file, group.known.values()):
            print_line(console, f"recorded {counted(added, 'training')} in {file}")
    return group


def track_reproduction(found: Reproduction, report: Sequence[Path], folder: Path, runs_dir: Path) -> None:
    """Logs the report to MLflow, in the experiment `reproductions`; the trainings are runs of their searches."""
    tracker = Tracker.open(folder, found.name, "reproductions", resolve_tracking_uri(runs_dir))
    tracker.describe_experiment({KIND: MODEL_TRAINING, NOTE: "Reports of reproduced tables of the papers."})
    tracker.set_tags({"paper": found.plan.table.paper, "scale": found.plan.scale, "code_version": code_version()})
    for path in report:
        tracker.log_artifact(path)
    tracker.finish("FINISHED", wait_s=FLUSH_S)
