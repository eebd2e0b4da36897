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


class _MindsTheEnd:
    """A scheduler that leaves a trial's last report alone, and remembers which trials it has stopped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if END in result:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision


class NoEarlyStop(_MindsTheEnd, FIFOScheduler):
    """Every trial runs to its end."""


class Asha(_MindsTheEnd, ASHAScheduler):
    """Asynchronous successive halving, by epochs."""


class Median(_MindsTheEnd, MedianStoppingRule):
    """Stops a trial whose best is below the median of the others' means, by epochs."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Each epoch has been counted when it was reported; Ray's rule would count the last report once more."""


class Population(_MindsTheEnd, PopulationBasedTraining):
    """Trials that fall behind go on from the state of one that leads, with a few values changed."""


Scheduler = NoEarlyStop | Asha | Median | Population


def build_scheduler(search: Search, mutable: Mutable | None) -> Scheduler:
    """The scheduler of a search. Raises SearchError when pbt would change a key that must not change."""
    config = search.scheduler
    metric, mode = search.deciding
    common = {"time_attr": EPOCH, "metric": metric, "mode": mode}
    match config.kind:
        case "asha":
            # Reaching max_t is no reason to stop: the trial is about to return the figures of its best checkpoint.
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
    """Keys that pbt changes. Raises SearchError when one that is asked for must not change, or when there are none."""
    if mutable is None:
        raise SearchError("scheduler pbt needs to be told which keys may change in the middle of training")
    asked = search.scheduler.mutate
    if asked is not None and (firm := [key for key in asked if not mutable(key)]):
        raise SearchError(
            f"scheduler.mutate: {', '.join(firm)} cannot change in the middle of training; "
            f"those that can: {', '.join(key for key in search.space if mutable(key)) or 'none of this space'}"
        )
    keys = [key for key in search.space if mutable(key) and (asked is None or key in asked)]
    if not keys:
        raise SearchError(
            f"scheduler pbt finds no key that may change in the middle of training in {list(search.space)}"
        )
    return keys


def mutate(space: Space, point: Mapping[str, Any], keys: list[str], resample: float, rng: random.Random) -> Point:
    """A point with some keys drawn anew or moved one step, which keeps the constraints and leaves other keys alone.

    Branches are followed: a key that appears is drawn, if it is one of `keys`. Returns the point itself when no change
    was found that is allowed.
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
