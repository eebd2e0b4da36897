"""Ask and tell: a thin layer over Optuna's samplers.

Each suggestion is a pure function of the search's seed, its own number and the results reported before, so a killed
search resumes exactly: `replay` the journaled trials in their order, then ask for the next.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import SamplerConfig, Search
from spikefleet_tune.space import Dimension, Point, Space, label, signature

_MODEL_TRIES = 24
_RANDOM_TRIES = 2000


@dataclass(frozen=True)
class Proposal:
    """A point to try; `memory` is what the sampler needs to replay it."""

    number: int
    point: Point
    memory: Mapping[str, Any] = field(default_factory=dict)


class PointSampler:
    """Suggests points that satisfy the constraints, each once, until none is left.

    Args:
        search: the search.
        queued: points, or parts of points, to suggest after the search's own `points` and before all others.
    """

    def __init__(self, search: Search, queued: Sequence[Mapping[str, Any]] = ()) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._seed = search.sampler, search.seed
        self._space: Space = search.space_view()
        self._directions = [{"max": "maximize", "min": "minimize"}[one] for one in search.directions]
        self._study = optuna.create_study(directions=self._directions, sampler=RandomSampler(seed=search.seed))
        self._distributions = {key: _distribution(one) for key, one in self._space.dimensions.items()}
        self._queue = [self._completed(part, i) for i, part in enumerate((*search.points, *queued))]
        self._listed = [] if search.sampler.kind == "listed" else self._space.listed()
        if search.sampler.kind == "grid":
            assert self._listed is not None, "the search file checks that a grid is finite"
            random.Random(search.seed).shuffle(self._listed)
        self._tried: set[str] = set()
        self._study_number: dict[int, int] = {}

    def ask(self, number: int) -> Proposal | None:
        """Suggests the point with this number.

        Returns:
            The suggestion; None if every point of the space was suggested.

        Raises:
            SearchError: no new point satisfies the constraints.
        """
        for point in self._queue:
            if signature(point) not in self._tried:
                return self._enter(number, point)
        if self._listed is not None:
            left = [point for point in self._listed if signature(point) not in self._tried]
            if not left:
                return None
            if self._config.kind == "grid":
                return self._enter(number, left[0])
        return self._suggested(number)

    def replay(self, number: int, point: Mapping[str, Any], memory: Mapping[str, Any] | None = None) -> None:
        """Replays a point that an earlier attempt suggested, with the `memory` of its proposal."""
        self._enter(number, dict(point), memory or {})

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Reports the result of a suggestion.

        Args:
            number: of the suggestion.
            values: the objectives in order; None for a trial that failed, was pruned, or was stopped without them.
        """
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL
        if values is None and len(self._directions) == 1:
            state = TrialState.PRUNED  # TPE ranks pruned trials last
        self._study.tell(self._study_number[number], values=values, state=state)

    def add_warm_start(self, point: Mapping[str, Any], values: Sequence[float]) -> None:
        """Reports the objectives, in order, of a point from another search; the point may still be suggested."""
        self._study.add_trial(self._frozen(point, {}, TrialState.COMPLETE, values))

    @property
    def exhausted(self) -> bool:
        """Whether no point is left to suggest."""
        if any(signature(point) not in self._tried for point in self._queue):
            return False
        return self._listed is not None and all(signature(point) in self._tried for point in self._listed)

    @property
    def left(self) -> int | None:
        """Points that a grid or a list has left; None for other samplers."""
        if self._config.kind not in ("grid", "listed"):
            return None
        every = {signature(point) for point in (*self._queue, *(self._listed or ()))}
        return len(every - self._tried)

    # ---------------------------------------------------------------------------------------- suggestions

    def _suggested(self, number: int) -> Proposal:
        """Asks the model a few times, then draws at random: a model of few points may repeat itself endlessly."""
        for attempt in range(_MODEL_TRIES):
            self._study.sampler = _sampler(self._config, self._derived_seed(number, str(attempt)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna warns of experimental features
                trial = self._study.ask()
                point = self._suggest(trial)
            if self._fits(point):
                self._note(number, point, trial.number)
                return Proposal(number, point, dict(self._study.trials[trial.number].system_attrs))
            self._study.tell(trial, state=TrialState.FAIL)
        rng = random.Random(self._derived_seed(number, "chance"))
        if self._listed is not None:
            return self._enter(number, rng.choice([p for p in self._listed if signature(p) not in self._tried]))
        for _ in range(_RANDOM_TRIES):
            if self._fits(point := self._space.draw(rng)):
                return self._enter(number, point)
        raise SearchError(
            f"{_RANDOM_TRIES} random draws found no new point that satisfies the constraints; "
            "widen the space or relax a constraint"
        )

    def _suggest(self, trial: optuna.Trial) -> Point:
        point: Point = {}
        for key, dimension in self._space.dimensions.items():
            if self._space.active(key, point):
                drawn = trial._suggest(key, self._distributions[key])
                point[key] = json.loads(drawn) if dimension.choice is not None else drawn
        return point

    def _fits(self, point: Point) -> bool:
        return signature(point) not in self._tried and self._space.keeps_constraints(point)

    def _completed(self, part: Mapping[str, Any], position: int) -> Point:
        """A part of a point, completed at random so that it satisfies the constraints."""
        if self._config.kind == "listed":
            return dict(part)
        rng = random.Random(self._derived_seed(position, "queue"))
        for _ in range(_RANDOM_TRIES):
            if self._space.keeps_constraints(point := self._space.draw(rng, part)):
                return point
        raise SearchError(f"no point with {dict(part)} satisfies the constraints; change that point or a constraint")

    def _derived_seed(self, number: int, use: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{number}/{use}".encode()).digest()[:4], "big")

    # --------------------------------------------------------------------------------------------- memory

    def _enter(self, number: int, point: Point, memory: Mapping[str, Any] | None = None) -> Proposal:
        """Adds a point that the model did not suggest to its study."""
        self._study.add_trial(self._frozen(point, memory or {}, TrialState.RUNNING, None))
        self._note(number, point, len(self._study.trials) - 1)
        return Proposal(number, point, dict(memory or {}))

    def _note(self, number: int, point: Point, study_number: int) -> None:
        self._tried.add(signature(point))
        self._study_number[number] = study_number

    def _frozen(
        self, point: Mapping[str, Any], memory: Mapping[str, Any], state: TrialState, values: Sequence[float] | None
    ) -> optuna.trial.FrozenTrial:
        dimensions = {key: self._space.dimensions[key] for key in point if key in self._space.dimensions}
        return optuna.trial.create_trial(
            state=state,
            values=None if values is None else list(values),
            params={
                key: label(point[key]) if one.choice is not None else point[key] for key, one in dimensions.items()
            },
            distributions={key: self._distributions[key] for key in dimensions},
            system_attrs=dict(memory),
        )


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Choices become JSON text: Optuna accepts no lists, and takes 1 and true as equal."""
    if dimension.choice is not None:
        return CategoricalDistribution([label(value) for value in dimension.choice])
    low, high = dimension.ends
    if dimension.integers is not None:
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=dimension.log_uniform is not None)


def _sampler(config: SamplerConfig, seed: int) -> BaseSampler:
    """A fresh sampler: its whole state is in the study."""
    match config.kind:
        case "tpe":
            return TPESampler(seed=seed, n_startup_trials=config.startup, constant_liar=True)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=config.population)
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=config.startup, warn_independent_sampling=False)
        case _:
            return RandomSampler(seed=seed)


def study_of(search: Search, trials: Sequence[tuple[Mapping[str, Any], Sequence[float]]]) -> optuna.Study:
    """An Optuna study of finished trials (point, objectives in order), for Optuna's analyses."""
    sampler = PointSampler(search)
    for point, values in trials:
        sampler.add_warm_start(point, values)
    return sampler._study
