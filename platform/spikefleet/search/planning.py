"""How long a search will take on this machine: from a few measured steps of its smallest and its largest trial.

Which points those are is estimated by the number of parameters times T times the images that a trial sees.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spikefleet.certificates.latency import device_name
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.options import Options
from spikefleet.search.run_search import check_runnable
from spikefleet.search.trial import TrialSetting
from spikefleet.status import waiting
from spikefleet.tasks import build_task
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.evaluation import first_batches
from spikefleet.training.events import Event, Started
from spikefleet.training.loop import train
from spikefleet.training.stopping import TrainingStopped
from spikefleet.training.threads import usable_cores
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.search_file import Search

_LOOKED_AT = 200
_STEPS = 5
"""Measured steps, after a first one that warms up."""


@dataclass(frozen=True)
class TrialTime:
    """The time of one trial, without its start, its report and its certificates."""

    point: Mapping[str, Any]
    step_s: float
    """Median of the measured steps; of a training of one or two steps, its whole time divided by them."""
    steps: int
    evaluation_s: float
    """Of the validation split, once; 0 where it is in the time of the steps."""
    epochs: int

    @property
    def seconds(self) -> float:
        """Of all steps and of the evaluation after each epoch."""
        return self.steps * self.step_s + self.epochs * self.evaluation_s


@dataclass(frozen=True)
class Plan:
    """What was measured, and what follows from it."""

    smallest: TrialTime
    largest: TrialTime
    trials: int | None
    """Of the budget or, where they are fewer, the points of the space; None where hours alone end the search."""
    at_a_time: int
    """Trials that this machine runs beside one another."""
    device: str
    hours: float | None
    """Of the budget."""
    stops_early: bool
    """Whether a scheduler may stop trials before their last epoch."""

    @property
    def seconds(self) -> tuple[float, float] | None:
        """If all trials were as the smallest, and as the largest; None where hours alone end the search."""
        if self.trials is None:
            return None
        rounds = math.ceil(self.trials / self.at_a_time)
        found = sorted(rounds * one.seconds for one in (self.smallest, self.largest))
        limit = math.inf if self.hours is None else 3600 * self.hours
        return min(found[0], limit), min(found[1], limit)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        points = {
            name: {
                "point": dict(one.point),
                "step_s": one.step_s,
                "steps": one.steps,
                "evaluation_s": one.evaluation_s,
                "epochs": one.epochs,
                "seconds": one.seconds,
            }
            for name, one in (("smallest", self.smallest), ("largest", self.largest))
        }
        return {
            **points,
            "trials": self.trials,
            "at_a_time": self.at_a_time,
            "device": self.device,
            "budget_hours": self.hours,
            "stops_early": self.stops_early,
            "seconds": self.seconds and list(self.seconds),
        }


def plan_search(search: Search, name: str, options: Options, console: Console) -> Plan:
    """Measures a few steps of the smallest and the largest trial of a search, and starts nothing.

    Args:
        search: the search.
        name: of the search.
        options: directories.
        console: for progress.

    Raises:
        UserError: the search is invalid, or its trials are not of this machine.
    """
    if address := options.address or os.environ.get("RAY_ADDRESS"):
        raise UserError(f"--plan measures this machine, but the search would run at {address}; leave out one of both")
    resources = search.resources
    if resources.workers > 1:
        raise UserError(
            f"--plan measures trials of one worker, but resources.workers is {resources.workers}; set --workers 1, and "
            "divide by the speed-up that you expect"
        )
    setting, store = check_runnable(search, name, options, console)
    smallest, largest = _ends(search, setting, store)

    def measured(which: str, point: Mapping[str, Any]) -> TrialTime:
        with waiting(console, f"measuring steps of the {which} trial"):
            return _measured(point, setting.config({**search.overrides, **point}), store, setting.gpu)

    with _threads(resources.cpus_per_worker):
        return Plan(
            measured("smallest", smallest),
            measured("largest", largest),
            _trials(search),
            _at_a_time(search),
            device_name(pick_device(setting.gpu)),
            search.budget.hours,
            search.scheduler.kind in ("asha", "median"),
        )


def _ends(search: Search, setting: TrialSetting, store: Store) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The points of the space that need least and most, by the estimate."""
    corners: Iterator[Mapping[str, Any]] = iter(())
    if search.sampler.kind != "listed":
        corners = islice(search.space_view().points(corners=True, look_at=_LOOKED_AT), _LOOKED_AT)
    sizes: dict[str, int] = {}
    costs: list[tuple[float, int, Mapping[str, Any]]] = []
    images = len(store.samples("train"))
    for number, point in enumerate((*search.points, *corners)):
        with suppress(UserError):
            config = setting.config({**search.overrides, **point})
            key = config.model.model_dump_json()
            if key not in sizes:
                with torch.device("meta"):
                    sizes[key] = sum(one.numel() for one in build_model(config.model).parameters())
            cost = sizes[key] * config.model.simulated_timesteps * config.train.epochs * images
            costs.append((cost, number, point))
    if not costs:
        raise UserError("no point of the space is valid; `spikefleet tune` without --plan says why")
    return min(costs)[2], max(costs)[2]


@dataclass
class _Clock:
    """Notes when steps begin, and asks to stop after the last one that is needed."""

    begun: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Started):
            self.steps, self.epochs = event.total_steps, event.epochs

    def before_step(self, group: ProcessGroup, step: int) -> None:
        self.begun.append(time.perf_counter())

    def done(self) -> bool:
        return len(self.begun) >= _STEPS + 2


def _measured(point: Mapping[str, Any], config: Config, store: Store, gpu: bool) -> TrialTime:
    # The checkpoints of a measurement are none of a run's, and must not reach its mirror.
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"mirror": None})})
    group, clock, start = ProcessGroup.single(gpu), _Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="spikefleet-plan-") as scratch, suppress(TrainingStopped):
        train(config, store, Path(scratch), group, clock, clock.before_step, clock.done)
    gaps = [after - before for before, after in zip(clock.begun[1:], clock.begun[2:], strict=False)]
    if not gaps:  # a training of one or two steps, which has ended, with its evaluations
        return TrialTime(point, (time.perf_counter() - start) / clock.steps, clock.steps, 0.0, clock.epochs)
    step_s = statistics.median(gaps)  # an evaluation between two epochs is no step
    return TrialTime(point, step_s, clock.steps, _evaluation_s(config, store, group), clock.epochs)


def _evaluation_s(config: Config, store: Store, group: ProcessGroup) -> float:
    """Seconds of an evaluation on the validation split: those of its first batch, by the number of images."""
    split = store.samples("val")
    task = build_task(config, DataSummary.of(store.manifest))
    network = build_model(config.model).to(group.device).eval()
    size = min(config.train.eval_batch, len(split))
    loader = BatchLoader(split, config.transform, train=False, device=group.device)
    batch = next(first_batches(loader, size, size)).to(group.device, config.train.channels_last)
    task.predict(network, batch)
    start = time.perf_counter()
    task.predict(network, batch)
    return (time.perf_counter() - start) * len(split) / size


def _trials(search: Search) -> int | None:
    listed = len(search.points) if search.sampler.kind == "listed" else None
    if listed is None and search.space and (points := search.space_view().listed()) is not None:
        listed = len(points)
    if search.budget.trials is None:
        return listed
    return search.budget.trials if listed is None else min(search.budget.trials, listed)


def _at_a_time(search: Search) -> int:
    """Trials that fit into this machine beside one another."""
    resources = search.resources
    fit = int(usable_cores() / resources.cpus_per_worker)
    if resources.gpus_per_worker:
        fit = min(fit, int(torch.cuda.device_count() / resources.gpus_per_worker))
    return max(1, min(fit, resources.max_concurrent or fit))


@contextmanager
def _threads(cpus: float) -> Iterator[None]:
    """The number of threads that a trial has, for Ray gives a process as many as CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
