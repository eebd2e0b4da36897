"""Runs a search on Ray Tune, and resumes it after an interruption or a crash.

Ray Tune starts, schedules and stops trials; its own files are scratch. A later attempt reads only the journal in the
search's directory: trials that ended are not run again; unfinished ones are, under the same names.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from spikefleet_tune.capacity import check_population, nodes_of_cluster, refuse_what_never_fits, requested
from spikefleet_tune.errors import SearchError, WaitedTooLong
from spikefleet_tune.interruption import Interrupted
from spikefleet_tune.journal import Clock, Past, SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.ledger import Ledger, SearchObserver, SilentObserver
from spikefleet_tune.messages import counted
from spikefleet_tune.on_tune import SCRATCH, TrialSource, run_on_tune, total_trials
from spikefleet_tune.result import SearchResult
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.schedulers import Mutable, Population, build_scheduler
from spikefleet_tune.search_file import Search
from spikefleet_tune.space import signature
from spikefleet_tune.trials import Trainable


def read_search_result(storage: Path, name: str) -> SearchResult:
    """Reads the result of a search without running it. Raises SearchError if there is no search of this name."""
    folder = SearchFolder(storage, name)
    search, past = folder.read_search(), folder.read()
    sampler = _restored(search, past)
    return _result(folder, search, past.records, folder.read_seconds(), _complete(search, past, sampler))


def run_search(
    search: Search,
    trainable: Trainable,
    storage: Path,
    name: str,
    observer: SearchObserver | None = None,
    *,
    mutable: Mutable | None = None,
    warm_start: Sequence[WarmStartPoint] = (),
    extend: int = 0,
    retry_failed: bool = False,
    grace_s: float = 30.0,
    wait_minutes: float = -1,
) -> SearchResult:
    """Runs a search, or resumes the one of this name, until its budget is used up.

    Ray must be initialised. A failing trial is recorded with its reason and does not stop the search.

    Args:
        search: the search.
        trainable: runs one trial, in the trial's own process.
        storage: parent of the search's directory.
        name: of the search; the same name resumes it.
        observer: callbacks in the driver.
        mutable: which keys the scheduler pbt may change during training.
        warm_start: points of earlier searches, saved in the journal: those with metrics inform the sampler, those
            without are tried first.
        extend: number of trials to add to a search that is complete.
        retry_failed: run each failed trial once more.
        grace_s: seconds in which running trials may save their state when a signal asks the search to stop.
        wait_minutes: how long the search may wait for hosts while no trial fits; -1: for ever.

    Returns:
        The trials that have ended, in this and earlier attempts.

    Raises:
        SearchError: the search is already running, was started with other settings, or never fits into this cluster.
        WaitedTooLong: no trial fitted into the cluster for `wait_minutes`; the same name resumes.
        Interrupted: SIGINT or SIGTERM; running trials save their state and stop, and the same name resumes them. A
            second signal does not wait for them.
    """
    folder = SearchFolder(storage, name)
    scheduler = build_scheduler(search, mutable)
    nodes = nodes_of_cluster()
    if not search.resources.autoscaling:
        refuse_what_never_fits(search.resources, nodes)
    _check_warm_start(search, warm_start)
    with folder.lock():
        folder.drop_torn_line()
        past = folder.read()
        _check_resources(folder, search, past)
        folder.begin(search)
        _remember(folder, past, warm_start)
        sampler = _restored(search, past)
        _extend(folder, search, past, sampler, extend)
        if retry_failed:
            past, sampler = _again(folder, search, past)
        clock = Clock(folder)
        ledger = Ledger(search, folder, past, sampler, observer or SilentObserver())
        source = TrialSource(search, past, sampler, ledger, clock)
        if isinstance(scheduler, Population):
            check_population(search, source.left, nodes)
        if not source.is_finished():
            with requested(search.resources):
                run_on_tune(search, trainable, folder, scheduler, source, ledger, clock, grace_s, wait_minutes)
            clock.tick(force=True)
        shutil.rmtree(folder.path / SCRATCH, ignore_errors=True)
        if source.interrupted is not None:
            raise Interrupted(source.interrupted)
        if source.overdue is not None:
            raise WaitedTooLong(source.overdue)
        done = _complete(search, folder.read(), sampler)
        return _result(folder, search, ledger.records, clock.seconds, done)


def _result(
    folder: SearchFolder, search: Search, records: Sequence[TrialRecord], seconds: float, complete: bool
) -> SearchResult:
    return SearchResult(folder.name, folder.path, search, tuple(records), seconds, complete)


# ------------------------------------------------------------------------------------------------ resuming


def _check_resources(folder: SearchFolder, search: Search, past: Past) -> None:
    """Unfinished trials resume with the resources that they were started with."""
    if not past.unfinished:
        return
    saved, given = (one.resources.model_dump() for one in (folder.read_search(), search))
    for key in ("workers", "cpus_per_worker", "gpus_per_worker"):
        if saved[key] != given[key]:
            raise SearchError(
                f"resources.{key}={given[key]:g}, but search {folder.name} has "
                f"{counted(len(past.unfinished), 'unfinished trial')} started with {saved[key]:g}; "
                f"set resources.{key}={saved[key]:g} until they end"
            )


def _check_warm_start(search: Search, warm_start: Sequence[WarmStartPoint]) -> None:
    space = search.space_view()
    for given in warm_start:
        space.check(given.point, given.origin)
        if given.metrics is not None:
            if missing := [name for name in search.objectives if name not in given.metrics]:
                raise SearchError(f"{given.origin} has no metric {missing[0]}, which is an objective")
            if lost := [key for key in space.dimensions if space.active(key, given.point) and key not in given.point]:
                raise SearchError(f"{given.origin} has metrics, but no value for {lost[0]}")


def _remember(folder: SearchFolder, past: Past, warm_start: Sequence[WarmStartPoint]) -> None:
    """Journals warm-start points, each once."""
    held = {(signature(given.point), given.metrics is None) for given in past.warm_start}
    for given in warm_start:
        if (key := (signature(given.point), given.metrics is None)) not in held:
            held.add(key)
            past.warm_start.append(given)
            folder.append_warm_start(given)


def _restored(search: Search, past: Past) -> PointSampler:
    """The sampler in its state at the end of the last attempt.

    Raises:
        SearchError: a warm-start point in the journal is not in the space of the search.
    """
    _check_warm_start(search, past.warm_start)
    queued = [given.point for given in past.warm_start if given.metrics is None]
    sampler = PointSampler(search, queued)
    for given in past.warm_start:
        if given.metrics is not None:
            sampler.add_warm_start(given.point, [given.metrics[name] for name in search.objectives])
    for event, number in past.order:
        if event == "started":
            sampler.replay(number, past.proposed[number], past.started[number]["memory"])
        else:
            sampler.tell(number, past.ended[number].values(search.objectives))
    return sampler


def _complete(search: Search, past: Past, sampler: PointSampler) -> bool:
    if past.unfinished:
        return False
    total = total_trials(search, past)
    return sampler.exhausted or (total is not None and len(past.ended) >= total)


def _extend(folder: SearchFolder, search: Search, past: Past, sampler: PointSampler, trials: int) -> None:
    if trials < 0:
        raise SearchError(f"extend={trials} must be at least 0")
    if not trials:
        return
    if search.budget.trials is None:
        raise SearchError(f"search {folder.name} has no budget.trials to extend; raise budget.hours instead")
    total = total_trials(search, past)
    if search.budget.hours is not None and folder.read_seconds() >= search.budget.hours * 3600:
        raise SearchError(f"search {folder.name} has used up its {search.budget.hours:g} hours; raise budget.hours too")
    if not _complete(search, past, sampler):
        done = f"{len(past.ended)} of {counted(total or 0, 'trial')}"
        raise SearchError(f"search {folder.name} is not complete ({done}); resume it first")
    if sampler.exhausted:
        raise SearchError(f"search {folder.name} cannot be extended: it has tried every point of its space")
    folder.append("extended", trials=trials)
    past.extended += trials


def _again(folder: SearchFolder, search: Search, past: Past) -> tuple[Past, PointSampler]:
    """Marks failed trials as unfinished, each once."""
    for record in past.records:
        if record.status == "failed" and record.number not in past.retried:
            folder.append("again", number=record.number)
    renewed = folder.read()
    return renewed, _restored(search, renewed)
