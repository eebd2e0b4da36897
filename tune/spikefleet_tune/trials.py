"""Trials on Ray Tune: dotted overrides, each handed to a trainable that this package knows nothing else about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Overrides = Mapping[str, Any]
"""Dotted configuration keys and their values, for example `{"model.timesteps": 2}`."""


class Report(Protocol):
    """What a trial calls after each epoch."""

    def __call__(self, metrics: Mapping[str, float]) -> None: ...


Trainable = Callable[[Overrides, str, Report], Mapping[str, float]]
"""(overrides, name of the trial, report) -> figures at the end. Runs in the trial's own process."""


@dataclass(frozen=True)
class TrialResult:
    """A finished trial: what it reported last, what it returned, or why it failed."""

    name: str
    overrides: Overrides
    metrics: Mapping[str, float]
    failure: str | None = None


def run_trials(
    trainable: Trainable, points: Sequence[Overrides], storage: Path, name: str, *, cpus_per_trial: float = 1
) -> list[TrialResult]:
    """Runs each point as a one-worker trial, as many at a time as the cluster has CPUs; results in order of points.

    Ray must be initialised. A failing trial is recorded with its reason and stops no other.
    Raises ValueError when there are no points, or when no trial could ever be placed.
    """
    import ray
    from ray import tune

    if not points:
        raise ValueError("there are no points to try; give at least one mapping of overrides")
    present = ray.cluster_resources().get("CPU", 0.0)
    if cpus_per_trial > present:
        raise ValueError(f"cpus_per_trial={cpus_per_trial:g}, but the cluster has {present:g} CPUs; lower it")

    def trial(config: dict[str, Any]) -> None:
        position = config["position"]
        figures = trainable(points[position], f"{name}-{position:04d}", lambda metrics: tune.report(dict(metrics)))
        tune.report({**figures, "position": position})

    grid = tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus_per_trial}),
        param_space={"position": tune.grid_search(list(range(len(points))))},
        run_config=tune.RunConfig(name=name, storage_path=str(storage.absolute()), verbose=0),
    ).fit()
    return sorted((_result(one, points, name) for one in grid), key=lambda result: result.name)


def _result(one: Any, points: Sequence[Overrides], name: str) -> TrialResult:
    position = one.config["position"]
    metrics = {key: value for key, value in (one.metrics or {}).items() if isinstance(value, float)}
    failure = None if one.error is None else str(one.error).strip().splitlines()[-1]
    return TrialResult(f"{name}-{position:04d}", points[position], metrics, failure)
