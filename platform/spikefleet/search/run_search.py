"""A whole search: checked against the configuration before anything starts, tracked in MLflow, drawn, reported.

Each trial is a nested run under the search's own; its directory is that of any run, so a trial can be evaluated,
predicted with and registered like one. `spikefleet_tune` runs the search and knows none of this.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet.certificates.certify import certify
from spikefleet.cluster.session import quiet_ray
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.errors import RunError, UserError
from spikefleet.files import write_json
from spikefleet.plugins import loaded_plugins
from spikefleet.registry.api import Promotion
from spikefleet.runs.options import Options
from spikefleet.runs.registration import register_run
from spikefleet.runs.run_dir import Run
from spikefleet.search.display import SearchDisplay
from spikefleet.search.mlflow_observer import FLUSH_S, SearchTracker, check_same_data
from spikefleet.search.trial import TrialSetting, as_trial, mutable_keys, refusal_of, reportable, reported_by_epoch
from spikefleet.status import print_line, waiting
from spikefleet.tasks import build_task
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.errors import SearchError
from spikefleet_tune.journal import SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.report import write_report
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search import read_search_result, run_search
from spikefleet_tune.search_check import check_search
from spikefleet_tune.search_file import Search, search_of

_LOOKED_AT = 200


def run_tracked_search(
    search: Search,
    name: str,
    options: Options,
    console: Console,
    *,
    extend: int = 0,
    warm_start: str | None = None,
    retry_failed: bool = False,
) -> SearchResult:
    """Runs a search, or resumes the one of this name; writes its report beside it.

    Args:
        search: what to search.
        name: of the search's directory.
        options: where.
        console: for progress.
        extend: add so many trials to a search that is done.
        warm_start: name of an earlier search whose trials inform this one.
        retry_failed: run failed trials once more.

    Raises:
        UserError: it could not run, before anything is started.
        KeyboardInterrupt: the same command resumes it.
    """
    setting, config, store = _setting(search, name, options, console)
    data = DataSummary.of(store.manifest)
    task = build_task(config, data)
    folder = options.searches_dir / name
    try:
        names = task.metric_names
        check_search(search, refusal_of(setting, search.overrides), reportable(names), reported_by_epoch(names))
        check_same_data(folder, data)
        if folder.is_dir():  # before Ray is started: that takes seconds
            with SearchFolder(options.searches_dir, name).lock():
                pass
        known = _known_points(search, warm_start, options, console)
        with ExitStack() as held:
            with waiting(console, "starting Ray"):
                held.enter_context(_session(search, options))
            display = held.enter_context(SearchDisplay(console, search))
            tracker = SearchTracker(name, options, search, display, data, setting.config)
            try:
                result = run_search(
                    search,
                    as_trial(setting),
                    options.searches_dir,
                    name,
                    tracker,
                    mutable=mutable_keys(config, list(search.space)) if setting.shares_checkpoints else None,
                    warm_start=known,
                    extend=extend,
                    retry_failed=retry_failed,
                )
            except BaseException:
                tracker.abandon()
                raise
        with waiting(console, "drawing plots") as announce:
            paths = write_report(result, report_of(result))
            announce("delivering records to MLflow")
            tracker.finish(result, paths)
    except SearchError as error:
        raise UserError(str(error)) from None
    return result


def read_tracked_search(name: str, options: Options) -> SearchResult | None:
    """What the search of this name has found, without running it; None when there is none. Raises UserError."""
    if not (options.searches_dir / name).is_dir():
        return None
    try:
        return read_search_result(options.searches_dir, name)
    except SearchError as error:
        raise UserError(str(error)) from None


def extension_of(name: str, options: Options) -> int:
    """Trials by which the search of this name was extended so far. Raises UserError."""
    try:
        folder = SearchFolder(options.searches_dir, name)
        return folder.read().extended if folder.path.is_dir() else 0
    except SearchError as error:
        raise UserError(str(error)) from None


def report_of(result: SearchResult) -> Path:
    """Where the report of a search lies."""
    return result.folder / "report"


def _setting(search: Search, name: str, options: Options, console: Console) -> tuple[TrialSetting, Config, Store]:
    resources = search.resources
    if resources.workers > 1 and resources.gpus_per_worker not in (0, 1):
        raise UserError(
            f"resources.gpus_per_worker={resources.gpus_per_worker:g}: of several workers each has a GPU of its own "
            "or none; a fraction is for trials with one worker"
        )
    setting = TrialSetting(
        recipe=search.recipe,
        store="",
        runs_dir=options.trials_dir(name),
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        gpu=resources.gpus_per_worker > 0,
        shares_checkpoints=search.scheduler.kind == "pbt",
        energy_by_epoch="energy_mj" in search.objectives and search.may_stop_early,
        plugins=loaded_plugins(),
        data=options.data,
    )
    config = _possible_config(search, setting)
    store = open_data(config.data, options.stores_dir, console)
    return replace(setting, store=store.absolute_location), config, store


def _possible_config(search: Search, setting: TrialSetting) -> Config:
    """A configuration that the search tries: task and data are the same in all.

    Where no point is possible, that under the space, if it can be: `check_search` then says what is wrong.
    """
    space = search.space_view()
    others = () if search.sampler.kind == "listed" else space.points(corners=True, look_at=_LOOKED_AT)
    for point in (*search.points, *others):
        with suppress(UserError):
            return setting.config({**search.overrides, **point})
    return setting.config(search.overrides)


def _session(search: Search, options: Options) -> Any:
    quiet_ray()
    from spikefleet.cluster.session import ray_session

    resources = search.resources
    gpus = resources.workers * resources.gpus_per_worker
    return ray_session(
        options.address,
        cpus=resources.workers * resources.cpus_per_worker,
        gpus=gpus,
        verbose=options.verbose,
        dashboard=resources.workers > 1,
    )


def _known_points(search: Search, warm_start: str | None, options: Options, console: Console) -> list[WarmStartPoint]:
    """Points of an earlier search that this one's space has.

    With their figures where it pursued the same objectives on the same recipe, and varied nothing else.
    """
    if warm_start is None:
        return []
    earlier = read_search_result(options.searches_dir, warm_start)
    same = earlier.search.recipe == search.recipe and earlier.search.objectives == search.objectives
    same = same and earlier.search.overrides == search.overrides
    space, points, misfits = search.space_view(), [], 0
    for record in earlier.comparable:
        point = {key: value for key, value in record.point.items() if key in search.space}
        told = (
            same
            and len(point) == len(record.point)
            and all(key in point for key in space.dimensions if space.active(key, point))
        )
        figures = {name: record.figures[name] for name in search.objectives} if told else None
        origin = f"{warm_start}, trial {record.name}"
        try:
            space.check(point, origin)
        except SearchError:
            misfits += 1
        else:
            points.append(WarmStartPoint(point, figures, origin))
    if misfits:
        print_line(
            console,
            f"{misfits} of {len(earlier.comparable)} trials of {warm_start} lie outside of this space; "
            "they are left out",
        )
    return points


# ----------------------------------------------------------------------------------------- after the search


def confirm_front(
    result: SearchResult, seeds: int, options: Options, console: Console, retry_failed: bool = False
) -> list[dict[str, Any]]:
    """Trains each member of the front with other seeds; mean and standard deviation of each objective.

    The trainings are a search of their own, `NAME-confirm-...`, named by the members, which goes on and grows.
    """
    members = result.front
    if not members:
        raise RunError(f"search {result.name} has no trial with figures, so there is nothing to confirm")
    setting, _, _ = _setting(result.search, result.name, options, console)
    fixed = {key: value for key, value in result.search.overrides.items() if key != "train.seed"}
    points = {}
    for record in members:
        own = setting.config(record.overrides).train.seed
        points[record.name] = [{**record.point, "train.seed": own + 1 + seed} for seed in range(seeds)]
    tree = {
        "recipe": result.search.recipe,
        "overrides": fixed,
        "points": [points[record.name][seed] for seed in range(seeds) for record in members],
        "sampler": "listed",
        "objectives": dict(result.search.objectives),
        "resources": result.search.resources.model_dump(mode="json"),
    }
    named = sorted(json.dumps(dict(record.point), sort_keys=True) for record in members)
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:8]
    name = f"{result.name}-confirm-{digest}"
    again = run_tracked_search(search_of(tree), name, options, console, retry_failed=retry_failed)
    rows = []
    for record in members:
        runs = [one for one in again.comparable if dict(one.point) in points[record.name]]
        row: dict[str, Any] = {"trial": record.name, "seeds": len(runs)}
        for name in result.search.objectives:
            values = [one.figures[name] for one in runs]
            row[name] = {
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "search": record.figures[name],
            }
        rows.append(row)
    path = report_of(result) / "confirmation.json"
    write_json(path, rows)
    uri = resolve_tracking_uri(options.runs_dir)
    tracker = Tracker.open(result.folder, result.name, f"search-{result.name}", uri)
    tracker.log_artifact(path, "report")
    tracker.finish("FINISHED" if result.complete else "KILLED", wait_s=FLUSH_S)
    return rows


def register_trial(result: SearchResult, chosen: str, options: Options, console: Console) -> Promotion:
    """Registers a trial of a search with its proof and its energy card: `knee`, `best`, or a trial's name."""
    record = _chosen(result, chosen)
    _, _, store = _setting(result.search, result.name, options, console)
    run = Run(options.trials_dir(result.name) / record.name)
    config, done = run.config(), run.record()
    tracking_uri = resolve_tracking_uri(options.runs_dir)
    tracker = Tracker.open(run.path, record.name, f"search-{result.name}", tracking_uri)
    with waiting(console, "delivering records to MLflow") as announce:
        tracker.finish("FINISHED", wait_s=FLUSH_S)
        if tracker.run_id is None:
            raise RunError(f"the tracking server does not answer, so trial {record.name} cannot be registered now")
        certificates = certify(config, run.best_checkpoint(), run.path / "report", store, announce)
        announce(f"registering trial {record.name}")
        return register_run(
            config,
            run,
            tracker.run_id,
            tracking_uri,
            certificates=certificates,
            validation=done["validation"],
            test=done["test"],
        )


def _chosen(result: SearchResult, chosen: str) -> TrialRecord:
    finished = [record for record in result.comparable if record.status == "finished"]
    if not finished:
        raise RunError(f"search {result.name} has no finished trial to register")
    if chosen == "knee":
        if result.knee is None or result.knee.status != "finished":
            raise UserError(f"the knee of search {result.name} is no finished trial; name another one")
        return result.knee
    if chosen == "best":
        name, direction = next(iter(result.search.objectives.items()))
        return (max if direction == "max" else min)(finished, key=lambda record: record.figures[name])
    for record in finished:
        if record.name == chosen:
            return record
    listed = ", ".join(record.name for record in finished[:10])
    raise UserError(f"search {result.name} has no finished trial {chosen!r}; it has {listed}")
