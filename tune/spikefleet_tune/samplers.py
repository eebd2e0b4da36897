"""Asking for points and telling what came of them: a thin layer over Optuna's samplers.

Each proposal is a pure function of the search's seed, its own number and what was told before, so that a search that
was killed resumes as if it had not been: `replay` the recorded trials in the order of their numbers, and ask on.
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
    """A point to try, and what the sampler must be handed back to remember it by."""

    number: int
    point: Point
    memory: Mapping[str, Any] = field(default_factory=dict)


class PointSampler:
    """Proposes points that keep the constraints, each one once, until there are none left.

    `queued` are points (or parts of points) to propose first, after the search's own.
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
            assert self._listed is not None, "a grid was checked to be finite"
            random.Random(search.seed).shuffle(self._listed)
        self._tried: set[str] = set()
        self._study_number: dict[int, int] = {}

    def ask(self, number: int) -> Proposal | None:
        """The proposal with this number, or None when every point of the space has been proposed.

        Raises SearchError when no point that keeps the constraints could be found.
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
        """Takes up a point that was proposed in an earlier launch."""
        self._enter(number, dict(point), memory or {})

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """What came of a proposal: the objectives in order, or None when it failed, was pruned or stopped without."""
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL
        if values is None and len(self._directions) == 1:
            state = TrialState.PRUNED  # which tpe takes for worse than everything else
        self._study.tell(self._study_number[number], values=values, state=state)

    def add_warm_start(self, point: Mapping[str, Any], values: Sequence[float]) -> None:
        """Figures of a point that this search has not tried itself; it may still be proposed."""
        self._study.add_trial(self._frozen(point, {}, TrialState.COMPLETE, values))

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to propose."""
        if any(signature(point) not in self._tried for point in self._queue):
            return False
        return self._listed is not None and all(signature(point) in self._tried for point in self._listed)

    @property
    def left(self) -> int | None:
        """Points still to propose of a grid or a list; None for samplers that choose."""
        if self._config.kind not in ("grid", "listed"):
            return None
        every = {signature(point) for point in (*self._queue, *(self._listed or ()))}
        return len(every - self._tried)

    # ------------------------------------------------------------------------------------------ proposals

    def _suggested(self, number: int) -> Proposal:
        """Asks the model a few times, then chance: a model of few points may repeat itself for ever."""
        for attempt in range(_MODEL_TRIES):
            self._study.sampler = _sampler(self._config, self._derived_seed(number, str(attempt)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Optuna: that this or that is experimental
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
            f"no new point that keeps the constraints was found in {_RANDOM_TRIES} draws; "
            "widen the space or loosen a constraint"
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
        """A part of a point, filled up by chance so that it keeps the constraints."""
        if self._config.kind == "listed":
            return dict(part)
        rng = random.Random(self._derived_seed(position, "queue"))
        for _ in range(_RANDOM_TRIES):
            if self._space.keeps_constraints(point := self._space.draw(rng, part)):
                return point
        raise SearchError(f"no point with {dict(part)} that keeps the constraints was found")

    def _derived_seed(self, number: int, use: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{number}/{use}".encode()).digest()[:4], "big")

    # --------------------------------------------------------------------------------------------- memory

    def _enter(self, number: int, point: Point, memory: Mapping[str, Any] | None = None) -> Proposal:
        """Takes a point that the model did not propose into its memory."""
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
    """Choices travel as JSON text: Optuna takes no lists, and holds 1 and true for equal."""
    if dimension.choice is not None:
        return CategoricalDistribution([label(value) for value in dimension.choice])
    low, high = dimension.ends
    if dimension.integers is not None:
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=dimension.log_uniform is not None)


def _sampler(config: SamplerConfig, seed: int) -> BaseSampler:
    """A sampler without a past: what it needs to know is in the study."""
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
    """An Optuna study of finished trials (point, objectives), for its analyses."""
    sampler = PointSampler(search)
    for point, values in trials:
        sampler.add_warm_start(point, values)
    return sampler._study
