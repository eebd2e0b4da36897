"""Ray Tune's schedulers, built from a search: ASHA, median stopping and population-based training."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import Search
from spikefleet_tune.space import Point, Space
from spikefleet_tune.trials import END, EPOCH

Mutable = Callable[[str], bool]
"""Whether a key may change in the middle of training."""

_TRIES = 50


class _IgnoresFinalReport:
    """A scheduler that ignores a trial's final report, and records in `stopped` which trials it stopped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Returns Ray Tune's decision: CONTINUE, PAUSE or STOP."""
        if END in result:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision


class NoEarlyStop(_IgnoresFinalReport, FIFOScheduler):
    """No early stopping."""


class Asha(_IgnoresFinalReport, ASHAScheduler):
    """Asynchronous successive halving (ASHA), by epochs."""


class Median(_IgnoresFinalReport, MedianStoppingRule):
    """Median stopping rule, by epochs: stops a trial whose best is worse than the median of the others' means."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Does nothing: each epoch was counted when it was reported, and Ray's rule would count the last one twice."""


class Population(_IgnoresFinalReport, PopulationBasedTraining):
    """Population-based training: a trial of the worst quantile resumes from one of the best, with changed values."""


Scheduler = NoEarlyStop | Asha | Median | Population


def build_scheduler(search: Search, mutable: Mutable | None) -> Scheduler:
    """The scheduler of a search.

    Args:
        search: the search.
        mutable: which keys may change during training; only pbt needs it.

    Raises:
        SearchError: pbt has no key to change, or would change one that cannot change.
    """
    config = search.scheduler
    metric, mode = search.deciding
    common = {"time_attr": EPOCH, "metric": metric, "mode": mode}
    match config.kind:
        case "asha":
            # A trial that reaches max_t is about to return the metrics of its best checkpoint: do not stop it.
            return Asha(
                **common,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
                max_t=max(config.max_epochs, config.grace_epochs),
                stop_last_trials=False,
            )
        case "median":
            return Median(**common, grace_period=config.grace_epochs, min_samples_required=config.min_trials)
        case "pbt":
            keys = mutated_keys(search, mutable)
            rng = random.Random(search.seed)
            space = search.space_view()

            def explore(trial: dict[str, Any]) -> dict[str, Any]:
                point = mutate(space, trial["point"], keys, config.resample, rng)
                return {**trial, "point": point, "overrides": {**search.overrides, **point}}

            return Population(
                **common,
                perturbation_interval=config.interval_epochs,
                quantile_fraction=config.quantile,
                custom_explore_fn=explore,
                log_config=False,
            )
        case _:
            return NoEarlyStop()


def mutated_keys(search: Search, mutable: Mutable | None) -> list[str]:
    """The keys that pbt changes.

    Args:
        search: the search; its `scheduler.mutate` names the keys, by default all that may change.
        mutable: which keys may change during training.

    Raises:
        SearchError: `mutable` is missing, `scheduler.mutate` names a key that cannot change, or there are no keys.
    """
    if mutable is None:
        raise SearchError("scheduler pbt needs a `mutable` function that says which keys may change during training")
    given = search.scheduler.mutate
    can_change = [key for key in search.space if mutable(key)]
    if given is not None and (fixed := [key for key in given if not mutable(key)]):
        raise SearchError(
            f"scheduler.mutate: {', '.join(fixed)} cannot change during training; "
            f"keys that can: {', '.join(can_change) or 'none of this space'}"
        )
    keys = [key for key in can_change if given is None or key in given]
    if not keys:
        raise SearchError(
            f"scheduler pbt needs a key that may change during training, found only {', '.join(search.space)}"
        )
    return keys


def mutate(space: Space, point: Mapping[str, Any], keys: list[str], resample: float, rng: random.Random) -> Point:
    """Resamples some keys of a point, or moves them one step; the constraints still hold.

    A key that appears because its branch opens is drawn, if it is one of `keys`.

    Args:
        space: the space of the point.
        point: values by key.
        keys: the keys that may change.
        resample: probability that a key is drawn anew instead of moved one step.
        rng: source of randomness.

    Returns:
        The new point; the point itself if no allowed change was found.
    """
    for _ in range(_TRIES):
        changed: Point = {}
        allowed = True
        for key, dimension in space.dimensions.items():
            if not space.active(key, changed):
                continue
            if key not in keys:
                allowed &= key in point
                changed[key] = point.get(key)
            elif key not in point or rng.random() < resample:
                changed[key] = dimension.draw(rng)
            else:
                changed[key] = dimension.step(point[key], rng)
        if allowed and space.keeps_constraints(changed):
            return changed
    return dict(point)
