"""Runs a search on Ray Tune, and resumes it after whatever has ended the last launch.

Ray Tune starts, schedules and stops trials; its own files are scratch. The journal in the search's directory is what a
later launch reads: trials that ended are not run again, those that were running are, under their names.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from spikefleet_tune.capacity import check_population, nodes_of_cluster, refuse_what_never_fits
from spikefleet_tune.errors import SearchError
from spikefleet_tune.journal import Clock, Past, SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.ledger import Ledger, SearchObserver, SilentObserver
from spikefleet_tune.on_tune import SCRATCH, TrialSource, run_on_tune, total_trials
from spikefleet_tune.result import SearchResult
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.schedulers import Mutable, Population, build_scheduler
from spikefleet_tune.search_file import Search
from spikefleet_tune.space import signature
from spikefleet_tune.trials import Trainable


def read_search_result(storage: Path, name: str) -> SearchResult:
    """What a search has found, without running it. Raises SearchError when there is none."""
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
) -> SearchResult:
    """Runs a search, or resumes the one of this name, until its budget is spent.

    Ray must be initialised. `mutable` says which keys the scheduler pbt may change. `warm_start` is remembered:
    points with figures inform the sampler, those without are tried first. `extend` adds trials to a search that is
    done. `retry_failed` runs trials that failed once more, once.
    A failing trial is recorded with its reason and stops nothing. Ctrl-C stops the trials, leaves them to be resumed
    under the same name, and raises KeyboardInterrupt; a second one does not wait.
    Raises SearchError when the search is running already, was started with other settings, or can never run on this
    cluster.
    """
    folder = SearchFolder(storage, name)
    scheduler = build_scheduler(search, mutable)
    nodes = nodes_of_cluster()
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
            run_on_tune(search, trainable, folder, scheduler, source, ledger, clock)
            clock.tick(force=True)
        shutil.rmtree(folder.path / SCRATCH, ignore_errors=True)
        if source.interrupted:
            raise KeyboardInterrupt
        done = _complete(search, folder.read(), sampler)
        return _result(folder, search, ledger.records, clock.seconds, done)


def _result(
    folder: SearchFolder, search: Search, records: Sequence[TrialRecord], seconds: float, complete: bool
) -> SearchResult:
    return SearchResult(folder.name, folder.path, search, tuple(records), seconds, complete)


# ------------------------------------------------------------------------------------------------ resuming


def _check_resources(folder: SearchFolder, search: Search, past: Past) -> None:
    """Trials that are under way resume with what they were started with."""
    if not past.unfinished:
        return
    held, wanted = (one.resources.model_dump() for one in (folder.read_search(), search))
    for key in ("workers", "cpus_per_worker", "gpus_per_worker"):
        if held[key] != wanted[key]:
            raise SearchError(
                f"search {folder.name} has {len(past.unfinished)} trials under way, started with "
                f"resources.{key}={held[key]:g}; resume with that, and change it to {wanted[key]:g} after them"
            )


def _check_warm_start(search: Search, warm_start: Sequence[WarmStartPoint]) -> None:
    space = search.space_view()
    for given in warm_start:
        space.check(given.point, given.origin)
        if given.figures is not None:
            if missing := [name for name in search.objectives if name not in given.figures]:
                raise SearchError(f"{given.origin} has no figure for the objective {missing[0]}")
            if lost := [key for key in space.dimensions if space.active(key, given.point) and key not in given.point]:
                raise SearchError(f"{given.origin} has figures, but no value for {lost[0]}")


def _remember(folder: SearchFolder, past: Past, warm_start: Sequence[WarmStartPoint]) -> None:
    """Writes warm-start points down, once each."""
    held = {(signature(given.point), given.figures is None) for given in past.warm_start}
    for given in warm_start:
        if (key := (signature(given.point), given.figures is None)) not in held:
            held.add(key)
            past.warm_start.append(given)
            figures = None if given.figures is None else dict(given.figures)
            folder.append("known", point=dict(given.point), figures=figures, origin=given.origin)


def _restored(search: Search, past: Past) -> PointSampler:
    """The sampler as it was when the last launch ended. Raises SearchError when the journal is of another space."""
    _check_warm_start(search, past.warm_start)
    queued = [given.point for given in past.warm_start if given.figures is None]
    sampler = PointSampler(search, queued)
    for given in past.warm_start:
        if given.figures is not None:
            sampler.add_warm_start(given.point, [given.figures[name] for name in search.objectives])
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
        raise SearchError(f"a search cannot be extended by {trials} trials")
    if not trials:
        return
    if search.budget.trials is None:
        raise SearchError("a search that only hours end is extended by a larger budget.hours")
    total = total_trials(search, past)
    if search.budget.hours is not None and folder.read_seconds() >= search.budget.hours * 3600:
        raise SearchError(f"search {folder.name} has used up its {search.budget.hours:g} hours; raise budget.hours too")
    if not _complete(search, past, sampler):
        raise SearchError(f"search {folder.name} is not done ({len(past.ended)} of {total} trials); resume it first")
    if sampler.exhausted:
        raise SearchError(f"search {folder.name} has tried every point of its space; there is nothing to extend")
    folder.append("extended", trials=trials)
    past.extended += trials


def _again(folder: SearchFolder, search: Search, past: Past) -> tuple[Past, PointSampler]:
    """Takes back the end of trials that failed, once each."""
    for record in past.records:
        if record.status == "failed" and record.number not in past.retried:
            folder.append("again", number=record.number)
    renewed = folder.read()
    return renewed, _restored(search, renewed)
