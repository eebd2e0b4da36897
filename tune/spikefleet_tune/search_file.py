"""The schema of a search file: recipe, space, objectives, constraints, sampler, scheduler, budget and resources."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib import resources
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from spikefleet_tune.direction import Direction
from spikefleet_tune.errors import SearchError
from spikefleet_tune.kinds import changed_kinds
from spikefleet_tune.messages import nearest
from spikefleet_tune.space import MOST_LISTED, Dimension, Part, Space

_DRAWS = 2000


class SamplerConfig(Part):
    """How points are suggested. Every kind supports several objectives."""

    kind: Literal["random", "grid", "tpe", "nsga2", "gp", "listed"] = Field(
        "tpe", description="sampling algorithm; listed tries only `points`, in order"
    )
    startup: int = Field(10, ge=1, description="tpe, gp: random points before the model is used")
    population: int = Field(12, ge=2, le=1_000_000, description="nsga2: size of a generation")


class SchedulerConfig(Part):
    """Which trials are stopped early, or (pbt) resume from another trial's checkpoint with other values."""

    kind: Literal["none", "asha", "median", "pbt"] = "none"
    metric: str | None = Field(None, description="reported metric to decide by; default: the only objective")
    mode: Direction | None = Field(None, description="max or min, for a metric that is not an objective")
    grace_epochs: int = Field(1, ge=1, description="asha, median: epochs before a trial can be stopped")
    reduction: int = Field(3, ge=2, description="asha: one trial in this many is promoted to the next rung")
    max_epochs: int = Field(100, ge=1, description="asha: epochs of the longest trial; no rung at or above it")
    min_trials: int = Field(3, ge=1, description="median: trials that must have reached an epoch before one is stopped")
    interval_epochs: int = Field(1, ge=1, description="pbt: epochs between two perturbations")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="pbt: fraction of trials that is replaced, and fraction that is copied"
    )
    resample: float = Field(
        0.25, ge=0, le=1, description="pbt: probability that a value is drawn anew instead of moved one step"
    )
    mutate: tuple[str, ...] | None = Field(None, description="pbt: keys to change; default: all that can change")


class BudgetConfig(Part):
    """When the search ends: at the first limit. A grid or a list also ends with its last point."""

    trials: int | None = Field(None, ge=1, le=10_000_000, description="trials, over all attempts")
    hours: float | None = Field(None, gt=0, le=1_000_000, description="wall-clock hours, over all attempts")


class ResourcesConfig(Part):
    """The resources of one trial."""

    workers: int = Field(
        1,
        ge=1,
        le=100_000,
        description="1: training in the trial's process; more: a worker group that the trial starts",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each worker")
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs of each worker; a fraction lets several one-worker trials share a GPU"
    )
    max_concurrent: int | None = Field(
        None, ge=1, le=1_000_000, description="trials at a time; default: as many as fit into the cluster"
    )
    retries: int = Field(1, ge=0, description="restarts of a trial whose process died")
    autoscaling: bool = Field(
        False,
        description="the cluster grows: hosts that are missing are asked for, for max_concurrent trials (one if not "
        "set), and waited for, not refused",
    )


class Search(Part):
    """A whole search, frozen; `space_view()` gives the space with its constraints."""

    recipe: str = Field(min_length=1, description="recipe that every trial trains")
    overrides: Mapping[str, Any] = Field(default_factory=dict, description="dotted overrides of all trials")
    space: Mapping[str, Dimension] = Field(default_factory=dict, description="values of each dotted key")
    points: tuple[Mapping[str, Any], ...] = Field(
        (), description="points, or parts of points, to try first; for listed, complete overrides"
    )
    objectives: Mapping[str, Direction] = Field(min_length=1, description="max or min for each metric")
    constraints: tuple[str, ...] = Field((), description="conditions over keys that every point satisfies")
    sampler: SamplerConfig = SamplerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    resources: ResourcesConfig = ResourcesConfig()
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampler")

    @field_validator("sampler", "scheduler", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if both := sorted(self.space.keys() & self.overrides.keys()):
            raise SearchError(f"{both[0]} is in both space and overrides; keep one of them")
        self._check_space()
        self._check_sampler()
        self._check_scheduler()
        return self

    def _check_space(self) -> None:
        if self.sampler.kind == "listed":
            if self.space or self.constraints:
                raise SearchError("sampler listed tries only `points`; remove space and constraints")
            for position, point in enumerate(self.points):
                if both := sorted(point.keys() & self.overrides.keys()):
                    raise SearchError(f"{both[0]} is in both points[{position}] and overrides; keep one of them")
            return
        if not self.space:
            raise SearchError("space is empty; add at least one key")
        space = self.space_view()
        for position, point in enumerate(self.points):
            space.check(point, f"points[{position}]")
        rng = random.Random(self.seed)
        if not any(space.keeps_constraints(space.draw(rng)) for _ in range(_DRAWS)):
            listed = space.listed()
            if not listed:
                raise SearchError(f"no point satisfies the constraints {', '.join(map(repr, self.constraints))}")

    def _check_sampler(self) -> None:
        kind = self.sampler.kind
        if kind == "listed" and not self.points:
            raise SearchError("sampler.kind=listed needs points; add at least one to `points`")
        if kind == "grid":
            for key, dimension in self.space.items():
                if dimension.values is None:
                    raise SearchError(f"space.{key} is continuous; sampler grid needs `choice` or `int` for every key")
            if self.space_view().listed() is None:
                raise SearchError(f"the grid has more than {MOST_LISTED} points; use fewer values or another sampler")
        elif kind != "listed" and self.budget.trials is None and self.budget.hours is None:
            raise SearchError("budget is empty; set budget.trials, budget.hours or both")

    def _check_scheduler(self) -> None:
        scheduler = self.scheduler
        if scheduler.kind == "none":
            return
        if scheduler.metric is None and len(self.objectives) > 1:
            raise SearchError(
                f"scheduler {scheduler.kind} decides by one metric, but there are {len(self.objectives)} objectives; "
                f"set scheduler.metric, for example scheduler.metric={next(iter(self.objectives))}"
            )
        if scheduler.metric is not None and scheduler.metric not in self.objectives and scheduler.mode is None:
            raise SearchError(f"scheduler.metric={scheduler.metric} is not an objective; set scheduler.mode=max or min")
        if scheduler.mode is not None and scheduler.mode != self.objectives.get(self.deciding[0], scheduler.mode):
            raise SearchError(
                f"scheduler.mode={scheduler.mode} contradicts the objective {self.deciding[0]}; remove scheduler.mode"
            )
        if scheduler.kind == "pbt":
            if self.resources.max_concurrent is not None:
                raise SearchError(
                    f"resources.max_concurrent={self.resources.max_concurrent} has no effect with scheduler pbt, which "
                    "pauses trials itself; leave it out"
                )
            for key in scheduler.mutate or ():
                if key not in self.space:
                    raise SearchError(f"scheduler.mutate: {key!r} is not in the space; {nearest(key, self.space)}")
            if self.budget.trials is None and self.sampler.kind not in ("grid", "listed"):
                raise SearchError("scheduler pbt needs the size of its population; set budget.trials")

    @property
    def deciding(self) -> tuple[str, Direction]:
        """Metric and direction by which the scheduler decides, and which pick the best epoch of a stopped trial."""
        metric = self.scheduler.metric or next(iter(self.objectives))
        return metric, self.objectives.get(metric) or self.scheduler.mode or "max"

    @property
    def may_stop_early(self) -> bool:
        """Whether a trial may be stopped before its last epoch, with the metrics of its best one."""
        return self.scheduler.kind != "none" or self.budget.hours is not None

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The direction of each objective, in order."""
        return tuple(self.objectives.values())

    def space_view(self) -> Space:
        """The space with its constraints and the fixed overrides."""
        return Space(self.space, self.overrides, self.constraints)

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; `Search.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


# ---------------------------------------------------------------------------------------------------- reading


def list_searches() -> list[str]:
    """Names of the searches that come with the package."""
    folder = resources.files("spikefleet_tune") / "searches"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def search_text(name: str) -> str:
    """The YAML text of a search that comes with the package. Raises SearchError for an unknown name."""
    if name not in list_searches():
        raise SearchError(f"search {name!r} does not exist; {nearest(name, list_searches())}")
    return (resources.files("spikefleet_tune") / "searches" / f"{name}.yaml").read_text(encoding="utf-8")


def search_of(tree: Mapping[str, Any], origin: str = "search") -> Search:
    """Validates plain data.

    Args:
        tree: the content of a search file.
        origin: file or name, for error messages.

    Raises:
        SearchError: one message for each invalid field.
    """
    try:
        search = Search.model_validate(tree)
    except ValidationError as error:
        problems = [_message(one) for one in error.errors()]
        raise SearchError(f"{origin}: " + "; ".join(dict.fromkeys(problems))) from None
    if problems := list(changed_kinds(tree, search.dump())):
        raise SearchError(f"{origin}: {'; '.join(problems)}")
    return search


def _message(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {path!r}; {nearest(location[-1], _fields_at(location[:-1]))}"
    if error["type"] == "missing":
        return f"{path!r} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not path or isinstance(error["input"], Mapping | BaseModel):
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}={error['input']!r}: {message}"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Keys of the section at a location."""
    if location[:1] == ["space"]:
        model: type[BaseModel] = Dimension
    else:
        model = Search
        for part in location:
            field = model.model_fields.get(part)
            annotation = field.annotation if field else None
            candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
            model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]
