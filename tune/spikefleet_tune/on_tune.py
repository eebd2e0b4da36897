"""One attempt of a search on Ray Tune: its search algorithm, its callback and its stopper."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.search_algorithm import SearchAlgorithm
from ray.tune.stopper import Stopper

from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.capacity import nodes_of_cluster, trial_request, trials_at_once
from spikefleet_tune.interruption import Interrupted, handling
from spikefleet_tune.journal import Clock, Past, SearchFolder
from spikefleet_tune.ledger import Ledger
from spikefleet_tune.lost_hosts import Hosts, Waits
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.schedulers import Scheduler
from spikefleet_tune.search_file import Search
from spikefleet_tune.trials import Trainable, describe_error, tune_function

SCRATCH = "ray_tune"
"""Ray Tune's own files in the search's directory; no attempt reads those of another."""

_CAPACITY_EVERY = 2.0
_KEPT_HERE = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"})
"""Variables that Ray Tune would send with each trial: into its logs, and to everybody with the cluster's token."""


def total_trials(search: Search, past: Past) -> int | None:
    """Trials of the whole search, extensions included; None if no number of trials ends it."""
    return None if search.budget.trials is None else search.budget.trials + past.extended


class TrialSource(SearchAlgorithm):
    """The search algorithm of Ray Tune: first the unfinished trials of the last attempt, then new suggestions.

    It starts no more trials at a time than fit into the cluster with all their workers.
    """

    def __init__(self, search: Search, past: Past, sampler: PointSampler, ledger: Ledger, clock: Clock) -> None:
        self._search, self._sampler, self._ledger, self._clock = search, sampler, ledger, clock
        self._again = [(number, past.started[number]) for number in past.unfinished]
        self._next = max(past.started, default=-1) + 1
        self._total = total_trials(search, past)
        ledger.total = self._foreseen(past)
        self._capacity, self._capacity_since = 0, -_CAPACITY_EVERY
        self._spec: dict[str, Any] = {}
        self.interrupted: int | None = None
        """The signal that ended the attempt."""
        self.waits: Waits | None = None
        """Whether any trial fits; Ray Tune asks nobody else while it has no trial at all."""

    def _foreseen(self, past: Past) -> int | None:
        """Trials of the whole search, if that is known."""
        left = self._sampler.left
        listed = None if left is None else len(past.started) + left
        return min((number for number in (self._total, listed) if number is not None), default=None)

    @property
    def left(self) -> int | None:
        """Trials still to start, if that is known."""
        return None if self._total is None else self._total - self._next + len(self._again)

    @property
    def overdue(self) -> str | None:
        """Why the attempt has ended, if it waited for hosts for too long."""
        return None if self.waits is None else self.waits.overdue

    @property
    def total_samples(self) -> int:
        """For Ray Tune's console; 0 if the number is not known."""
        return self._total or 0

    @property
    def out_of_time(self) -> bool:
        """Whether the hours of the budget are used up."""
        hours = self._search.budget.hours
        return hours is not None and self._clock.seconds >= hours * 3600

    def add_configurations(self, experiments: Any) -> None:
        """Takes the experiment of Ray Tune whose specification all trials share."""
        (experiment,) = experiments if isinstance(experiments, list) else [experiments]
        self._spec = experiment.spec

    def is_finished(self) -> bool:
        """Whether no trial is left to start."""
        if self.waits is not None:
            self.waits.tick()
        if self._finished or self.interrupted is not None or self.overdue is not None or self.out_of_time:
            return True
        if self._again:
            return False
        return (self._total is not None and self._next >= self._total) or self._sampler.exhausted

    def next_trial(self) -> Any:
        """The next trial; None if none fits now, or none is left."""
        if self.is_finished() or not self._fits():
            return None
        if self._again:
            number, line = self._again.pop(0)
            return self._trial(number, line["point"], line["memory"])
        proposal = self._sampler.ask(self._next)
        if proposal is None:
            return None
        self._next += 1
        return self._trial(proposal.number, proposal.point, proposal.memory)

    def _fits(self) -> bool:
        if self._search.scheduler.kind == "pbt":
            return True  # Ray Tune time-shares the population
        if time.monotonic() - self._capacity_since >= _CAPACITY_EVERY:
            self._capacity = trials_at_once(self._search.resources, nodes_of_cluster())
            self._capacity_since = time.monotonic()
        return len(self._ledger.live) < self._capacity

    def _trial(self, number: int, point: Mapping[str, Any], memory: Mapping[str, Any]) -> Any:
        config = self._ledger.begin(number, point, memory)
        return _create_trial_from_spec({**self._spec, "config": config}, _make_parser(), trial_id=f"{number:04d}")


def run_on_tune(
    search: Search,
    trainable: Trainable,
    folder: SearchFolder,
    scheduler: Scheduler,
    source: TrialSource,
    ledger: Ledger,
    clock: Clock,
    grace_s: float,
    wait_minutes: float,
) -> None:
    """Runs one attempt, until the budget ends or the user interrupts it.

    Args:
        search: the search.
        trainable: runs one trial in its own process.
        folder: the search's directory.
        scheduler: the scheduler of the search.
        source: suggests the trials; its `interrupted` says which signal ended the attempt.
        ledger: records what happens to the trials.
        clock: measures the hours of the budget.
        grace_s: seconds in which running trials may save their state when a signal arrives.
        wait_minutes: how long the search may wait for hosts while no trial fits; -1: for ever.
    """
    scratch = folder.path / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    stop = scratch / "stop.json"
    stopping = _Stopping(source, ledger, stop, grace_s)
    hosts = Hosts(search.resources)
    source.waits = waits = Waits(search.resources, wait_minutes, ledger.waits)

    class Bookkeeper(tune.Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            stopping.running = {int(trial.trial_id) for trial in trials if trial.status == "RUNNING"}
            waits.tick()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ledger.running(int(trial.trial_id), trial.config)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            ledger.reported(int(trial.trial_id), result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ledger.completed(int(trial.trial_id), stopped=trial.trial_id in scheduler.stopped)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            error = trial.get_error()
            reason = hosts.lost() or ("its process died" if error is None else describe_error(error))
            ledger.lost(int(trial.trial_id), reason)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            error = trial.get_error()
            ledger.failed(int(trial.trial_id), "its process died" if error is None else describe_error(error))

    class BudgetStopper(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            clock.tick()
            if source.overdue is not None:
                return True
            return source.out_of_time if source.interrupted is None else stopping.is_over()

    config = search.scheduler
    deciding = None if config.kind == "none" else search.deciding[0]
    function = tune_function(trainable, folder.name, search.objectives, deciding, config.kind == "pbt", stop)
    population = source.left if config.kind == "pbt" else None
    with _tune_environment(population), _interruptible(source), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consider boosting PBT")
        tune.Tuner(
            tune.with_resources(function, trial_request(search.resources)),
            tune_config=tune.TuneConfig(
                search_alg=source, scheduler=scheduler, num_samples=-1, trial_dirname_creator=lambda one: one.trial_id
            ),
            run_config=tune.RunConfig(
                name=SCRATCH,
                storage_path=str(folder.path),
                stop=BudgetStopper(),
                callbacks=[Bookkeeper()],
                failure_config=tune.FailureConfig(max_failures=search.resources.retries),
                verbose=0,
            ),
        ).fit()
    if source.out_of_time and source.interrupted is None:
        for number in list(ledger.live):
            ledger.stop_early(number, f"the budget of {search.budget.hours:g} hours is used up")


class _Stopping:
    """The end of an attempt after a signal: its trials are asked to save their state, then Ray Tune stops them.

    Args:
        source: knows the signal.
        ledger: knows which trials have ended.
        stop: the file that trials look at.
        grace_s: seconds to wait for them.
    """

    def __init__(self, source: TrialSource, ledger: Ledger, stop: Path, grace_s: float) -> None:
        self._source, self._ledger, self._stop, self._grace_s = source, ledger, stop, grace_s
        self._asked: set[int] | None = None
        self._deadline = 0.0
        self.running: set[int] = set()
        """Trials whose processes run now."""

    def is_over(self) -> bool:
        """Whether no trial that ran when the signal arrived still runs, or the time for it is over."""
        if self._asked is None:
            assert self._source.interrupted is not None
            self._ledger.stopping()
            self._asked, self._deadline = self.running, time.monotonic() + self._grace_s
            with suppress(OSError):  # a full disk: the trials are stopped without a new checkpoint
                self._stop.parent.mkdir(parents=True, exist_ok=True)
                name = signal.Signals(self._source.interrupted).name
                write_atomically(self._stop, json.dumps({"signal": name}))
        waiting = any(not self._ledger.has_ended(number) for number in self._asked & self.running)
        return not waiting or not self._stop.is_file() or time.monotonic() >= self._deadline


@contextmanager
def _tune_environment(population: int | None) -> Iterator[None]:
    """Sets what Ray Tune's driver reads from the environment, sends of it, and logs; restores all at the end."""
    settings = {
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last report has a status, no metrics
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new console prints a box at any verbosity
        **({"TUNE_MAX_PENDING_TRIALS_PG": str(population)} if population else {}),
    }
    before = {key: os.environ.get(key) for key in settings}
    # The traceback of each failed trial, and paragraphs on places that are missing: the observer says both in a line.
    execution = "ray.tune.execution"
    loggers = [
        logging.getLogger(f"{execution}.{name}") for name in ("tune_controller", "insufficient_resources_manager")
    ]
    levels = [logger.level for logger in loggers]
    os.environ.update(settings)
    propagated = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = propagated - _KEPT_HERE
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = propagated
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _interruptible(source: TrialSource) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops the trials after their step; a second one aborts.

    Raises:
        Interrupted: the second one; Ray Tune raises a plain KeyboardInterrupt for it.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if source.interrupted is not None:
            raise Interrupted(source.interrupted)
        source.interrupted = signum

    try:
        with handling(interrupt):
            yield
    except KeyboardInterrupt:
        if source.interrupted is None:
            raise
        raise Interrupted(source.interrupted) from None
