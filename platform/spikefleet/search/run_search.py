"""A search from start to end: validated before anything starts, tracked in MLflow, displayed, reported.

Each trial is a nested run of the search's run. Its directory is that of a normal run, so every command for runs works
on a trial too. `spikefleet_tune` runs the search itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet.certificates.certify import certify
from spikefleet.certificates.latency import LATENCY_MS
from spikefleet.cluster.session import quiet_ray, refuse_missing_gpus
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.errors import RunError, UserError
from spikefleet.files import write_json
from spikefleet.outputs import check_place
from spikefleet.plugins import loaded_plugins
from spikefleet.registry.api import Promotion
from spikefleet.runs.options import Options
from spikefleet.runs.registration import promote_version, register_run
from spikefleet.runs.report import complete_report
from spikefleet.runs.run_dir import Run
from spikefleet.runs.run_page import dataset_of, split_sizes
from spikefleet.search.display import SearchDisplay
from spikefleet.search.mlflow_observer import FLUSH_S, SearchTracker, check_same_data
from spikefleet.search.trial import TrialSetting, as_trial, mutable_keys, refusal_of, reportable, reported_by_epoch
from spikefleet.status import print_line, waiting
from spikefleet.tasks import build_task
from spikefleet.tracking.mlflow_client import quiet_mlflow, resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune import pareto
from spikefleet_tune.errors import SearchError, WaitedTooLong
from spikefleet_tune.journal import SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.messages import counted
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
    """Runs a search, or resumes the one of this name, and writes its report.

    Args:
        search: the search.
        name: of the search and its directory.
        options: directories and cluster.
        console: for progress.
        extend: number of trials to add to a search that is complete.
        warm_start: name of an earlier search whose trials inform this one.
        retry_failed: run each failed trial once more.

    Returns:
        The trials that have ended.

    Raises:
        UserError: the search is invalid or cannot be resumed; raised before any trial starts.
        RunError: no trial fitted into the cluster for `cluster.wait_minutes`; the same command resumes the search.
        Interrupted: SIGINT or SIGTERM; the same command resumes the search.
    """
    quiet_mlflow()  # Ray Tune imports it
    check_place(options.runs_dir, "--runs-dir")
    resolve_tracking_uri(options.runs_dir)  # a database that cannot be used is named before data is read
    setting, config, store = _setting(search, name, options, console)
    _check_splits(store)
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
        earlier = _warm_start_points(search, warm_start, options, console)
        with ExitStack() as held:
            with waiting(console, "starting Ray"):
                held.enter_context(_session(search, options))
            display = held.enter_context(SearchDisplay(console, search))
            dataset = dataset_of(data, store.absolute_location, split_sizes(store.manifest))
            tracker = SearchTracker(name, options, search, display, data, dataset, setting.config)
            try:
                result = run_search(
                    search,
                    as_trial(setting),
                    options.searches_dir,
                    name,
                    tracker,
                    mutable=mutable_keys(config, list(search.space)) if setting.shares_checkpoints else None,
                    warm_start=earlier,
                    extend=extend,
                    retry_failed=retry_failed,
                    grace_s=config.cluster.grace_s,
                    wait_minutes=config.cluster.wait_minutes,
                )
            except BaseException:
                tracker.abandon()
                raise
        with waiting(console, "drawing plots") as announce:
            paths = write_report(result, report_of(result))
            announce("delivering records to MLflow")
            tracker.finish(result, paths)
    except WaitedTooLong as error:
        raise RunError(str(error)) from None
    except SearchError as error:
        raise UserError(str(error)) from None
    return result


def check_runnable(search: Search, name: str, options: Options, console: Console) -> tuple[TrialSetting, Store]:
    """The setting of a search's trials and their data, checked as for a run; nothing is started or written.

    Raises:
        UserError: the search is invalid.
    """
    setting, config, store = _setting(search, name, options, console)
    _check_splits(store)
    names = build_task(config, DataSummary.of(store.manifest)).metric_names
    try:
        check_search(search, refusal_of(setting, search.overrides), reportable(names), reported_by_epoch(names))
    except SearchError as error:
        raise UserError(str(error)) from None
    return setting, store


def _check_splits(store: Store) -> None:
    if "val" not in store.manifest.splits:
        raise UserError(
            f"{store.location} has no validation split, by which a search compares its trials; set "
            "data.options.holdout above 0 in the search's overrides, or another store"
        )


def read_tracked_search(name: str, options: Options) -> SearchResult | None:
    """Reads the result of a search without running it; None if it does not exist.

    Raises:
        UserError: the search or its journal is damaged.
    """
    if not (options.searches_dir / name).is_dir():
        return None
    try:
        return read_search_result(options.searches_dir, name)
    except SearchError as error:
        raise UserError(str(error)) from None


def extension_of(name: str, options: Options) -> int:
    """Number of trials by which a search was extended so far. Raises UserError if its journal is damaged."""
    try:
        folder = SearchFolder(options.searches_dir, name)
        return folder.read().extended if folder.path.is_dir() else 0
    except SearchError as error:
        raise UserError(str(error)) from None


def report_of(result: SearchResult) -> Path:
    """Directory of a search's report."""
    return result.folder / "report"


def _setting(search: Search, name: str, options: Options, console: Console) -> tuple[TrialSetting, Config, Store]:
    resources = search.resources
    if resources.workers > 1 and resources.gpus_per_worker not in (0, 1):
        raise UserError(
            f"resources.gpus_per_worker={resources.gpus_per_worker:g} must be 0 or 1 with several workers per trial; "
            "set resources.workers=1 to share a GPU between trials"
        )
    setting = TrialSetting(
        recipe=search.recipe,
        store="",
        runs_dir=options.trials_dir(name),
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        gpu=resources.gpus_per_worker > 0,
        shares_checkpoints=search.scheduler.kind == "pbt",
        energy_by_epoch=search.may_stop_early and not search.objectives.keys().isdisjoint(("energy_mj", LATENCY_MS)),
        latency=LATENCY_MS in search.objectives,
        plugins=loaded_plugins(),
        data=options.data,
    )
    config = _possible_config(search, setting)
    refuse_missing_gpus(options.address, resources.workers * resources.gpus_per_worker)
    store = open_data(config.data, options.stores_dir, console)
    return replace(setting, store=store.absolute_location), config, store


def _possible_config(search: Search, setting: TrialSetting) -> Config:
    """The configuration of a point of the search; task and data are the same in all points.

    If no point is valid, that of the fixed overrides: `check_search` then reports the error.
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
    grows = resources.autoscaling and bool(options.address or os.environ.get("RAY_ADDRESS"))
    return ray_session(
        options.address,
        cpus=0 if grows else resources.workers * resources.cpus_per_worker,
        gpus=0 if grows else resources.workers * resources.gpus_per_worker,
        verbose=options.verbose,
        dashboard=resources.workers > 1,
    )


def _warm_start_points(
    search: Search, warm_start: str | None, options: Options, console: Console
) -> list[WarmStartPoint]:
    """The points of an earlier search that are in the space of this one.

    They have metrics if both searches have the same recipe, overrides and objectives, and the point has no other keys.
    """
    if warm_start is None:
        return []
    earlier = read_search_result(options.searches_dir, warm_start)
    same = earlier.search.recipe == search.recipe and earlier.search.objectives == search.objectives
    same = same and earlier.search.overrides == search.overrides
    space, points, misfits = search.space_view(), [], 0
    for record in earlier.comparable:
        point = {key: value for key, value in record.point.items() if key in search.space}
        comparable = (
            same
            and len(point) == len(record.point)
            and all(key in point for key in space.dimensions if space.active(key, point))
        )
        metrics = {name: record.metrics[name] for name in search.objectives} if comparable else None
        origin = f"{warm_start}, trial {record.name}"
        try:
            space.check(point, origin)
        except SearchError:
            misfits += 1
        else:
            points.append(WarmStartPoint(point, metrics, origin))
    if misfits:
        trials = counted(len(earlier.comparable), "trial")
        print_line(console, f"left out {misfits} of {trials} of {warm_start}: outside this space")
    return points


# ----------------------------------------------------------------------------------------- after the search


def confirm_trials(
    result: SearchResult,
    seeds: int,
    options: Options,
    console: Console,
    *,
    everyone: bool = False,
    retry_failed: bool = False,
) -> list[dict[str, Any]]:
    """Trains trials again with other seeds.

    These trainings are a search of their own, `NAME-confirm-DIGEST`; the same call resumes it, more seeds extend it.

    Args:
        result: of the search.
        seeds: number of further seeds for each trial.
        options: directories and cluster.
        console: for progress.
        everyone: also trials that are not on the front.
        retry_failed: run each failed training once more.

    Returns:
        For each trial: `trial` (its name), `seeds` (how many finished), `by_seed` (seed, seconds and
        metrics of each) and, for each
        objective, `mean`, `std` and `search` (the value in the search).

    Raises:
        RunError: the front is empty.
        UserError: the search is invalid or cannot be resumed.
    """
    members = result.comparable if everyone else result.front
    if not members:
        raise RunError(f"search {result.name} has no trial with metrics to confirm")
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
        by_seed = [
            {"seed": one.point["train.seed"], "seconds": one.seconds, "metrics": dict(one.metrics)} for one in runs
        ]
        row: dict[str, Any] = {"trial": record.name, "seeds": len(runs), "by_seed": by_seed}
        for name in result.search.objectives:
            values = [one.metrics[name] for one in runs]
            row[name] = {
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "search": record.metrics[name],
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
    """Registers a trial of a search with its certificates.

    Args:
        result: of the search.
        chosen: `knee`, `best` (in the first objective), or the name of a trial.
        options: directories and cluster.
        console: for progress.

    Returns:
        The alias of the new version, and why.

    Raises:
        RunError: no trial has finished, or the tracking server does not answer.
        UserError: the chosen trial does not exist or has not finished, or the registry fails.
    """
    record = chosen_trial(result, chosen)
    _, _, store = _setting(result.search, result.name, options, console)
    run = Run(options.trials_dir(result.name) / record.name)
    config, done = run.config(), run.record()
    tracking_uri = resolve_tracking_uri(options.runs_dir)
    tracker = Tracker.open(run.path, record.name, f"search-{result.name}", tracking_uri)
    with waiting(console, "delivering records to MLflow") as announce:
        tracker.finish("FINISHED", wait_s=FLUSH_S)
        if tracker.run_id is None:
            raise RunError(
                f"trial {record.name} was not registered: the tracking server does not answer; run the command again "
                "later"
            )
        best, report = run.best_checkpoint(), run.path / "report"
        certificates = certify(config, best, report, store, announce)
        evaluation = complete_report(config, best, report, store, announce)
        announce(f"registering trial {record.name}")
        version = register_run(
            config,
            run,
            tracker.run_id,
            tracking_uri,
            store=store,
            certificates=certificates,
            evaluation=evaluation,
            validation=done["validation"],
            test=done["test"],
        )
        validated = bool(done["validation"])
        return promote_version(config, version, store, options.stores_dir, tracking_uri, announce, validation=validated)


def confirmed_choice(result: SearchResult, confirmation: Sequence[Mapping[str, Any]], chosen: str) -> str:
    """The trial that `knee` or `best` means by trainings with other seeds, which had no part in the search.

    What is best of many trials by one seed is partly luck. Trials of which fewer seeds have finished are left out.

    Args:
        result: of the search.
        confirmation: as `confirm_trials` returns it.
        chosen: as for `register_trial`.

    Returns:
        The name of the trial; `chosen` where it is one, or where no training with another seed has finished.
    """
    finished = {record.name for record in result.comparable if record.status == "finished"}
    most = max((row["seeds"] for row in confirmation), default=0)
    rows = [row for row in confirmation if 0 < row["seeds"] == most and row["trial"] in finished]
    if chosen not in ("knee", "best") or not rows:
        return chosen
    objectives = dict(list(result.search.objectives.items())[: 1 if chosen == "best" else None])
    position = pareto.knee([[row[name]["mean"] for name in objectives] for row in rows], list(objectives.values()))
    assert position is not None
    return str(rows[position]["trial"])


def chosen_trial(result: SearchResult, chosen: str) -> TrialRecord:
    """The trial that `register_trial` registers, by the same words. Raises as that does."""
    finished = [record for record in result.comparable if record.status == "finished"]
    if not finished:
        raise RunError(f"search {result.name} has no finished trial to register")
    if chosen == "knee":
        if result.knee is None or result.knee.status != "finished":
            raise UserError(f"the knee of search {result.name} is not a finished trial; choose another trial")
        return result.knee
    if chosen == "best":
        name, direction = next(iter(result.search.objectives.items()))
        return (max if direction == "max" else min)(finished, key=lambda record: record.metrics[name])
    for record in finished:
        if record.name == chosen:
            return record
    listed = ", ".join(record.name for record in finished[:10])
    raise UserError(f"search {result.name} has no finished trial {chosen!r}; expected one of {listed}")
