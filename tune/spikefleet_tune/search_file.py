"""A search as plain data: what is varied, what is wanted, how points are chosen, and how much may be spent."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib import resources
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from spikefleet_tune.direction import Direction
from spikefleet_tune.errors import SearchError, nearest
from spikefleet_tune.space import Dimension, Part, Space

_DRAWS = 2000


class SamplerConfig(Part):
    """How points are chosen. All take several objectives."""

    kind: Literal["random", "grid", "tpe", "nsga2", "gp", "listed"] = Field(
        "tpe", description="listed: only `points`, in order"
    )
    startup: int = Field(10, ge=1, description="random points before the model of tpe or gp")
    population: int = Field(12, ge=2, description="members of a generation of nsga2")


class SchedulerConfig(Part):
    """Which trials are stopped early, or (pbt) go on from another's state with other values."""

    kind: Literal["none", "asha", "median", "pbt"] = "none"
    metric: str | None = Field(None, description="reported metric that decides; the only objective if not given")
    mode: Direction | None = Field(None, description="max or min, for a metric that is no objective")
    grace_epochs: int = Field(1, ge=1, description="asha, median: no trial is stopped before")
    reduction: int = Field(3, ge=2, description="asha: one in so many goes on to the next rung")
    max_epochs: int = Field(100, ge=1, description="asha: no rung at or after it")
    min_trials: int = Field(3, ge=1, description="median: trials that must have come so far")
    interval_epochs: int = Field(1, ge=1, description="pbt: epochs between two looks at the population")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share that is replaced, and share that is copied")
    resample: float = Field(0.25, ge=0, le=1, description="pbt: how often a value is drawn anew, not stepped")
    mutate: tuple[str, ...] | None = Field(None, description="pbt: keys that change; all that may if not given")


class BudgetConfig(Part):
    """When it ends: whichever comes first. A grid or a list also ends with its last point."""

    trials: int | None = Field(None, ge=1, description="trials, over all launches")
    hours: float | None = Field(None, gt=0, description="hours that the search runs, over all launches")


class ResourcesConfig(Part):
    """What one trial takes."""

    workers: int = Field(1, ge=1, description="1: in the trial's process; more: a group that the trial starts itself")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0, description="may be a fraction, for several workers on one GPU")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; what the cluster holds if not given")
    retries: int = Field(1, ge=0, description="restarts of a trial whose process died")


class Search(Part):
    """A whole search. Immutable; `space_view()` gives the space with its constraints."""

    recipe: str = Field(min_length=1)
    overrides: Mapping[str, Any] = Field(default_factory=dict, description="fixed dotted overrides")
    space: Mapping[str, Dimension] = Field(default_factory=dict)
    points: tuple[Mapping[str, Any], ...] = Field(
        (), description="points (or parts of them) to try first; for listed, whole overrides"
    )
    objectives: Mapping[str, Direction] = Field(min_length=1)
    constraints: tuple[str, ...] = ()
    sampler: SamplerConfig = SamplerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    resources: ResourcesConfig = ResourcesConfig()
    seed: int = Field(0, ge=0)

    @field_validator("sampler", "scheduler", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if both := sorted(self.space.keys() & self.overrides.keys()):
            raise SearchError(f"{both[0]} stands in both space and overrides; keep one")
        self._check_space()
        self._check_sampler()
        self._check_scheduler()
        return self

    def _check_space(self) -> None:
        if self.sampler.kind == "listed":
            if self.space or self.constraints:
                raise SearchError("sampler listed tries `points` and nothing else; leave space and constraints out")
            for position, point in enumerate(self.points):
                if both := sorted(point.keys() & self.overrides.keys()):
                    raise SearchError(f"{both[0]} stands in both points[{position}] and overrides; keep one")
            return
        if not self.space:
            raise SearchError("space is empty: there is nothing to search; give at least one key")
        space = self.space_view()
        for position, point in enumerate(self.points):
            space.check(point, f"points[{position}]")
        rng = random.Random(self.seed)
        if not any(space.keeps_constraints(space.draw(rng)) for _ in range(_DRAWS)):
            listed = space.listed()
            if not listed:
                raise SearchError(f"no point keeps the constraints {', '.join(map(repr, self.constraints))}")

    def _check_sampler(self) -> None:
        kind = self.sampler.kind
        if kind == "listed" and not self.points:
            raise SearchError("sampler.kind=listed needs points")
        if kind == "grid":
            for key, dimension in self.space.items():
                if dimension.values is None:
                    raise SearchError(f"space.{key} is continuous; sampler grid needs `choice` or `int` for every key")
            if self.space_view().listed() is None:
                raise SearchError("the grid has too many points; use fewer values or another sampler")
        elif kind != "listed" and self.budget.trials is None and self.budget.hours is None:
            raise SearchError("budget is empty; give trials, hours or both")

    def _check_scheduler(self) -> None:
        scheduler = self.scheduler
        if scheduler.kind == "none":
            return
        if scheduler.metric is None and len(self.objectives) > 1:
            raise SearchError(
                f"scheduler {scheduler.kind} decides by one metric, and there are {len(self.objectives)} objectives; "
                f"name it, for example scheduler.metric={next(iter(self.objectives))}"
            )
        if scheduler.metric is not None and scheduler.metric not in self.objectives and scheduler.mode is None:
            raise SearchError(f"scheduler.metric={scheduler.metric} is no objective; say scheduler.mode=max or min")
        if scheduler.mode is not None and scheduler.mode != self.objectives.get(self.deciding[0], scheduler.mode):
            raise SearchError(
                f"scheduler.mode={scheduler.mode}, but the objective {self.deciding[0]} has the other one"
            )
        if scheduler.kind == "pbt":
            if self.resources.max_concurrent is not None:
                raise SearchError(
                    "resources.max_concurrent has no effect with scheduler pbt, which pauses trials itself"
                )
            for key in scheduler.mutate or ():
                if key not in self.space:
                    raise SearchError(f"scheduler.mutate: {key!r} is no key of the space; {nearest(key, self.space)}")
            if self.budget.trials is None and self.sampler.kind not in ("grid", "listed"):
                raise SearchError("scheduler pbt needs budget.trials: they are its population")

    @property
    def deciding(self) -> tuple[str, Direction]:
        """Metric and direction by which a scheduler decides, and by which the best epoch of a stopped trial is told."""
        metric = self.scheduler.metric or next(iter(self.objectives))
        return metric, self.objectives.get(metric) or self.scheduler.mode or "max"

    @property
    def may_stop_early(self) -> bool:
        """Whether a trial may end before its training does, with the figures of its best epoch."""
        return self.scheduler.kind != "none" or self.budget.hours is not None

    @property
    def directions(self) -> tuple[Direction, ...]:
        return tuple(self.objectives.values())

    def space_view(self) -> Space:
        return Space(self.space, self.overrides, self.constraints)

    def dump(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold; `Search.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


# ---------------------------------------------------------------------------------------------------- reading


def list_searches() -> list[str]:
    """Names of the searches that come with the package."""
    folder = resources.files("spikefleet_tune") / "searches"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def search_text(name: str) -> str:
    """The YAML text of a search that comes with the package. Raises SearchError naming the nearest one."""
    if name not in list_searches():
        raise SearchError(f"there is no search {name!r}; {nearest(name, list_searches())}")
    return (resources.files("spikefleet_tune") / "searches" / f"{name}.yaml").read_text(encoding="utf-8")


def search_of(tree: Mapping[str, Any], origin: str = "search") -> Search:
    """Checks plain data against the schema. Raises SearchError with one sentence for each thing that is wrong."""
    try:
        return Search.model_validate(tree)
    except ValidationError as error:
        complaints = [_sentence(one) for one in error.errors()]
        raise SearchError(f"{origin}: " + "; ".join(dict.fromkeys(complaints))) from None


def _sentence(error: Mapping[str, Any]) -> str:
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
    """Keys that the section at a location knows."""
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
