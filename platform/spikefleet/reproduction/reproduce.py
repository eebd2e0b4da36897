"""Reproduces a table of a paper: trains its rows with several seeds and compares the results with the paper's.

All rows of a recipe and scale, of every table, are trials of one search, `paper-SCALE-RECIPE`: tables share trainings,
and further seeds extend the search.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spikefleet.certificates.energy_card import ENERGY, read_card
from spikefleet.config.recipes import load_config
from spikefleet.config.schema import Config, without_unused_branches
from spikefleet.errors import UserError
from spikefleet.reproduction.scales import Scale
from spikefleet.reproduction.table import Column, Entry, PaperTable
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.search.mlflow_observer import FLUSH_S
from spikefleet.search.run_search import read_tracked_search, run_tracked_search
from spikefleet.search.trial import chooses_data
from spikefleet.status import print_line
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.mlflow_pages import KIND, MODEL_TRAINING, NOTE
from spikefleet.tracking.tracker import Tracker
from spikefleet.versions import code_version
from spikefleet_models.energy import EnergyCard, energy_at_rates
from spikefleet_models.energy_constants import energy_constants
from spikefleet_models.families import build_model
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import check_options, find_source
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.messages import counted
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import search_of


@dataclass(frozen=True)
class ReproductionPlan:
    """What to reproduce."""

    table: PaperTable
    scale: Scale
    seeds: int = 3
    only: str = "*"
    """fnmatch pattern of rows, by name or "GROUP: NAME"."""
    overrides: Mapping[str, Any] | None = None
    """Dotted overrides of every row."""
    resources: Mapping[str, float] | None = None
    """Fields of Resources that replace those of the table."""
    retry_failed: bool = False
    """Run each failed training once more."""
    train: bool = True
    """False reads existing trainings only."""

    @property
    def data(self) -> dict[str, Any]:
        """Overrides that select other data; they are the same in all trainings of a search, which share one store."""
        return {key: value for key, value in (self.overrides or {}).items() if chooses_data(key)}

    def point(self, entry: Entry, seed: int) -> dict[str, Any]:
        """All overrides of a row's training.

        Args:
            entry: the row.
            seed: index of the seed, from 0; it is added to the `train.seed` of the row.
        """
        point = {**entry.group.overrides(entry.row, self.scale), **(self.overrides or {})}
        first = _config(entry.group.scales[self.scale].recipe, point).train.seed
        return {**point, "train.seed": first + seed}


@dataclass(frozen=True)
class Cell:
    """A value of the paper and ours, in the paper's unit."""

    paper: float | None
    values: tuple[float, ...] = ()
    """Ours, one for each seed; a single one if no training is needed."""
    same_data: bool = True
    """Whether ours are of the paper's data set; of another one they are another quantity."""

    @property
    def mean(self) -> float | None:
        """Our mean over seeds; None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the paper's value; None where ours are of other data."""
        return None if self.mean is None or self.paper is None or not self.same_data else self.mean - self.paper


@dataclass(frozen=True)
class ReproducedRow:
    """A row of the table with its results and their origin."""

    entry: Entry
    cells: Mapping[str, Cell]
    seeds: tuple[int, ...] = ()
    trials: tuple[str, ...] = ()
    data_hashes: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    split: str = ""
    """What the task's metrics were measured on: "test", or "val" where the data have no other images to report on."""
    remark: str = ""
    """Why it was not run, or not with all seeds; and which layers of its energy multiply sums of spikes."""
    data: str = ""
    """Name of the data set of its trainings; empty where it cannot run."""
    same_data: bool = True
    """Whether that is the paper's."""

    @property
    def name(self) -> str:
        """The data set of its trainings, and its name."""
        return self.entry.full_name if self.same_data or not self.data else f"{self.data}: {self.entry.row.name}"


@dataclass(frozen=True)
class Reproduction:
    """A table with our results beside the paper's."""

    plan: ReproductionPlan
    rows: tuple[ReproducedRow, ...]

    @property
    def name(self) -> str:
        """Table and scale, with a digest of the chosen rows and the overrides, if any."""
        name = f"{self.plan.table.name}-{self.plan.scale}"
        if self.plan.only == "*" and not self.plan.overrides:
            return name
        return f"{name}-{_short_digest([self.plan.only, dict(self.plan.overrides or {})])}"

    def pairs_in_order(self, column: str) -> tuple[int, int]:
        """Compares the order of rows with the paper's, within each group.

        Columns that are counted without training are left out.

        Args:
            column: key of the column.

        Returns:
            The number of pairs of rows in the paper's order, and the number of pairs that can be compared.
        """
        if self.plan.table.columns[column].origin == "network":
            return 0, 0
        kept = compared = 0
        for one, other in combinations(self.rows, 2):
            mine, theirs = one.cells[column], other.cells[column]
            if one.entry.group is not other.entry.group or None in (mine.mean, mine.paper, theirs.mean, theirs.paper):
                continue
            expected = mine.paper - theirs.paper  # type: ignore[operator]
            found = mine.mean - theirs.mean  # type: ignore[operator]
            if expected:
                compared += 1
                kept += expected * found > 0
        return kept, compared


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
        groups = ", ".join(dict.fromkeys(entry.group.name for rows in by_recipe.values() for entry in rows))
        raise UserError(
            f"{placed[0]} names one data set, but these rows need several ({groups}); select rows with --only "
            "'GROUP*', or prepare each store in the stores directory first (`spikefleet data prepare`)"
        )
    results: dict[str, SearchResult | None] = {}
    missing: dict[str, str] = {}
    for recipe, rows in by_recipe.items():
        try:
            results[recipe] = _trained(plan, recipe, rows, options, console)
        except (SourceError, StoreError, UserError) as error:
            if len(missing) + 1 == len(by_recipe):  # no row is left
                raise
            missing[recipe] = str(error)
            print_line(console, f"left out {rows[0].group.name}: {error}")
    found: list[ReproducedRow] = []
    for entry in entries:
        reason = entry.group.refusal(entry.row, plan.scale)
        recipe = "" if reason is not None else entry.group.scales[plan.scale].recipe
        reason = missing.get(recipe) if reason is None else reason
        if reason is None and (result := results[recipe]) is not None:
            found.append(_measured(plan, entry, result, options))
        else:
            data = _data_set(plan, entry) if recipe else ""
            same = _is_papers(entry, data)
            cells = _cells(plan.table, entry, [], same)
            remark = f"not run: {reason or 'nothing was trained yet'}"
            found.append(ReproducedRow(entry, cells, remark=remark, data=data, same_data=same))
    return Reproduction(plan, tuple(found))


def _trained(
    plan: ReproductionPlan, recipe: str, rows: Sequence[Entry], options: Options, console: Console
) -> SearchResult | None:
    """The search with the rows' trainings, after training the missing ones."""
    name = f"paper-{plan.scale}-{recipe}" + (f"-{_short_digest(plan.data)}" if plan.data else "")
    if not plan.train:
        return read_tracked_search(name, options)
    chosen = load_config(recipe).checkpoint
    resources = {**rows[0].group.scales[plan.scale].resources.model_dump(), **(plan.resources or {})}
    tree = {
        "recipe": recipe,
        "overrides": plan.data,
        "sampler": "listed",
        "points": list(_distinct(plan, rows)),
        "objectives": {f"val/{chosen.metric}": chosen.mode},
        "resources": resources,
    }
    return run_tracked_search(search_of(tree), name, options, console, retry_failed=plan.retry_failed)


def _distinct(plan: ReproductionPlan, rows: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """The distinct trainings of the rows, all with their first seed before the next one."""
    seen: set[str] = set()
    for seed in range(plan.seeds):
        for entry in rows:
            point = plan.point(entry, seed)
            digest = _digest(entry.group.scales[plan.scale].recipe, point)
            if digest not in seen:
                seen.add(digest)
                yield {key: value for key, value in point.items() if key not in plan.data}


def track_reproduction(found: Reproduction, report: Sequence[Path], folder: Path, runs_dir: Path) -> None:
    """Logs the report to MLflow, in the experiment `reproductions`; the trainings are runs of their searches."""
    tracker = Tracker.open(folder, found.name, "reproductions", resolve_tracking_uri(runs_dir))
    tracker.describe_experiment({KIND: MODEL_TRAINING, NOTE: "Reports of reproduced tables of the papers."})
    tracker.set_tags({"paper": found.plan.table.paper, "scale": found.plan.scale, "code_version": code_version()})
    for path in report:
        tracker.log_artifact(path)
    tracker.finish("FINISHED", wait_s=FLUSH_S)


# ------------------------------------------------------------------------------------------------ results


def _measured(plan: ReproductionPlan, entry: Entry, result: SearchResult, options: Options) -> ReproducedRow:
    """The results of a row, from its finished trainings."""
    recipe = result.search.recipe
    by_digest = {_digest(recipe, record.overrides): record for record in result.records}
    trials = options.trials_dir(result.name)
    runs: list[tuple[TrialRecord, Run]] = []
    seeds: list[int] = []
    problems: list[str] = []
    for seed in range(plan.seeds):
        point = plan.point(entry, seed)
        record = by_digest.get(_digest(recipe, point))
        if record is None:
            problems.append(f"seed {point['train.seed']} was not run")
        elif record.status != "finished":
            problems.append(f"seed {point['train.seed']} {record.status}: {record.reason}")
        elif _differs(run := Run(trials / record.name), _config(recipe, point)):
            problems.append(
                f"seed {point['train.seed']} was trained by an earlier form of recipe {recipe}; "
                f"move {trials.parent} away to train it again"
            )
        else:
            seeds.append(point["train.seed"])
            runs.append((record, run))
    remarks = [*problems, *_energy_remark(plan.table, [run for _, run in runs])]
    data = ", ".join(dict.fromkeys(run.data().dataset for _, run in runs)) or _data_set(plan, entry)
    same = _is_papers(entry, data)
    return ReproducedRow(
        entry,
        _cells(plan.table, entry, runs, same),
        tuple(seeds),
        tuple(record.name for record, _ in runs),
        tuple(dict.fromkeys(run.data().content_hash for _, run in runs)),
        tuple(dict.fromkeys(str(run.record().get("code_version", "unknown")) for _, run in runs)),
        _split_of(plan.table, [record for record, _ in runs]),
        "; ".join(remarks) if runs or not problems else f"not run: {'; '.join(problems)}",
        data,
        same,
    )


def _data_set(plan: ReproductionPlan, entry: Entry) -> str:
    """Name of the data set that the trainings of a row are meant for."""
    config = _config(entry.group.scales[plan.scale].recipe, entry.group.overrides(entry.row, plan.scale))
    return config.registry.dataset or config.data.source


def _is_papers(entry: Entry, data: str) -> bool:
    """Whether a data set is the one that the paper's values of a row are of."""
    full = entry.group.scales.get("full")
    return full is not None and data == _config(full.recipe, {}).registry.dataset


def _differs(run: Run, config: Config) -> bool:
    """Whether a run was trained with values that its recipe no longer has; the location of its data is ignored."""

    def compared(one: Config) -> dict[str, Any]:
        kept = ("model", "train", "optim", "shortcut", "checkpoint")
        tree = without_unused_branches(one.dump())
        options = check_options(find_source(one.data.source), one.data.options).model_dump(mode="json")
        data = {"transform": tree["data"]["transform"], "options": options, "seed": one.data.seed}
        return {**{key: tree[key] for key in kept}, **data}

    return compared(run.config()) != compared(config)


def _cells(
    table: PaperTable, entry: Entry, runs: Sequence[tuple[TrialRecord, Run]], same_data: bool = True
) -> dict[str, Cell]:
    known = _network_metrics(table, entry) if any(c.origin == "network" for c in table.columns.values()) else {}
    cells = {}
    for key, column in table.columns.items():
        if column.origin == "network":
            values = [known[key]] if key in known else []
        else:
            found = (_trial_metric(table, key, column, record, run) for record, run in runs)
            values = [value for value in found if value is not None]
        ours = tuple(value * column.factor for value in values)
        # The full network is that of the paper's data, whatever the scale.
        cells[key] = Cell(entry.row.paper.get(key), ours, same_data or column.origin == "network")
    return cells


def _trial_metric(table: PaperTable, key: str, column: Column, record: TrialRecord, run: Run) -> float | None:
    if column.origin == "run":
        return record.metrics.get(key, record.metrics.get(_on_validation(key)))
    assert table.counted is not None, "the table's validation requires it"
    value: float | None = getattr(_card(run).under(table.counted.constants), key)
    return value


def _on_validation(key: str) -> str:
    """The key of a test metric where the validation split has the only images to report on, as on COCO and ImageNet."""
    return f"val/{key.removeprefix('test/')}" if key.startswith("test/") else key


def _split_of(table: PaperTable, records: Sequence[TrialRecord]) -> str:
    """The split of the table's test metrics in trainings: "test", "val", or "" without such metrics."""
    keys = [key for key in table.columns if key.startswith("test/")]
    if any(key in record.metrics for record in records for key in keys):
        return "test"
    return "val" if any(_on_validation(key) in record.metrics for record in records for key in keys) else ""


def _card(run: Run) -> EnergyCard:
    return read_card(run.path / "report" / ENERGY)


def _energy_remark(table: PaperTable, runs: Sequence[Run]) -> Iterator[str]:
    """What a reader of energies must know: layers that no chip of binary spikes runs as additions."""
    if any(column.origin == "card" for column in table.columns.values()):
        layers = dict.fromkeys(layer for run in runs for layer in _card(run).integer_fed)
        if layers:
            yield f"{counted(len(layers), 'layer')} fed by sums of spikes, counted as MACs"


def _network_metrics(table: PaperTable, entry: Entry) -> dict[str, float]:
    """Parameters, MACs, and energy with the paper's additions: counted on the full network, without training."""
    if "full" not in entry.group.scales:
        return {}
    assert table.counted is not None, "the table's validation requires it"
    config = _config(entry.group.scales["full"].recipe, entry.group.overrides(entry.row, "full"))
    with torch.device("meta"):
        network = build_model(config.model)
    metrics = {"parameters": float(sum(parameter.numel() for parameter in network.parameters()))}
    if "macs" not in table.columns:
        return metrics
    side, constants = table.counted.side, energy_constants(table.counted.constants)
    card = energy_at_rates(network, (side, side), 0.0, constants, shortcuts=table.counted.shortcuts)
    additions = entry.row.paper.get("acs", 0.0) / table.columns["acs"].factor
    metrics["macs"] = card.macs
    if card.integer_fed:  # the paper's additions include these layers, which are among the MACs
        return metrics
    picojoules = card.macs * constants.mac_pj + additions * constants.ac_pj
    return {**metrics, "energy_uj": picojoules / 1e6}


def _short_digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def _digest(recipe: str, overrides: Mapping[str, Any]) -> str:
    """Digest of a training's configuration, however its overrides are spelled."""
    return _config(recipe, overrides).digest()


def _config(recipe: str, overrides: Mapping[str, Any]) -> Config:
    return load_config(recipe, overrides)
