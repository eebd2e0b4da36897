"""Learning-rate range test: Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3.

A training from the initial weights whose learning rate grows exponentially from step to step. The loss falls fastest
where the rate is large enough to train and small enough to be stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikefleet.config.recipes import override_config
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone
from spikefleet.training.splits import prepare_parts
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, training_step
from spikefleet.training.step_reading import NonFiniteError
from spikefleet_pipelines.store.reader import Store

_SMOOTHING = 0.9
_DIVERGED = 3.0
_LEAST_STEPS = 20


@dataclass(frozen=True)
class RangeTest:
    """The loss over the learning rate."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Of each step, before it was made."""
    smoothed: tuple[float, ...]
    """Their exponential mean, without the bias of its start."""
    suggested: float
    """The rate around which the loss falls fastest, over its logarithm."""
    lowest: float
    """The rate at which it is lowest; larger ones are unstable."""
    ended: str
    """Why the test ended, as a sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _Losses:
    """Keeps the loss of the latest step."""

    def __init__(self) -> None:
        self.loss = math.nan

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.loss = event.metrics["train/loss"]


def range_test(
    config: Config,
    store: Store,
    group: ProcessGroup,
    low: float,
    high: float,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RangeTest:
    """Trains with growing learning rates, until the loss is several times its least value or not finite.

    Args:
        config: of the run; its schedule is not used.
        store: its data.
        group: of this process alone.
        low: rate of the first step.
        high: rate of the last one.
        steps: at most.
        progress: called with steps done and in all.

    Raises:
        UserError: the rates do not grow, the steps are too few, or the loss is not finite from the start.
    """
    if not 0 < low < high:
        raise UserError(f"learning rates from {low:g} to {high:g} do not grow; set --low below --high, both above 0")
    if steps < _LEAST_STEPS:
        raise UserError(
            f"{steps} steps are too few for a range of learning rates; set --steps to {_LEAST_STEPS} or more"
        )
    if config.train.stream is not None:
        raise UserError(
            "a range of learning rates is not for streams, whose steps may have no label; set another recipe"
        )
    if config.init.source is not None or config.train.initial_weights is not None:
        raise UserError(
            "a range of learning rates is tried from random weights; leave init.from out, and take a smaller rate for "
            "fine-tuning than the one that is suggested"
        )
    here = _steady(config, steps)
    task, splits, plan = prepare_parts(here, store, group)
    state = TrainingState(here, group, store.manifest.content_hash, plan.steps_per_epoch)
    state.reads_late = False  # each loss decides on the next rate
    meter, kept = Meter(), _Losses()
    rates, losses = list[float](), list[float]()
    ended: str | None = None
    while ended is None:
        for batch in splits.train.epoch(plan, state.epoch, state.step_in_epoch):
            rate = low * (high / low) ** (len(losses) / (steps - 1))
            state.config = here.model_copy(update={"optim": here.optim.model_copy(update={"lr": rate})})
            try:
                training_step(state, task, batch, meter, kept)
            except NonFiniteError:
                ended = f"the loss or its gradient was not finite at {rate:.3g}"
                break
            rates.append(rate)
            losses.append(kept.loss)
            progress(len(losses), steps)
            if len(losses) > _LEAST_STEPS // 2 and losses[-1] > _DIVERGED * min(_smoothed(losses)):
                ended = f"the loss was {_DIVERGED:g} times its least value at {rate:.3g}"
            elif len(losses) == steps:
                ended = f"all {steps} steps were made"
            if ended is not None:
                break
        state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
    return _judged(rates, losses, ended)


def _steady(config: Config, steps: int) -> Config:
    """The configuration with a constant rate, and epochs for all steps."""
    return override_config(
        config,
        {
            "optim.schedule": "constant",
            "optim.milestones": [],
            "optim.warmup_epochs": 0,
            "optim.warmup_bias_lr": None,
            "optim.warmup_momentum": None,
            "train.epochs": max(config.train.epochs, steps),
            "train.segment": None,
            "train.cuda_graphs": False,
            "tracking.every_steps": 1,
            "cluster.workers": 0,
        },
        origin="range test",
    )


def _smoothed(losses: list[float]) -> list[float]:
    mean, found = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        found.append(mean / (1 - _SMOOTHING**count))
    return found


def _judged(rates: list[float], losses: list[float], ended: str) -> RangeTest:
    """The suggestion: where the loss falls fastest over the logarithm of the rate, before its minimum.

    A slope is that of the line of least squares through a tenth of the steps, so that one step does not decide.

    Raises:
        UserError: too few steps were made, or the loss never fell.
    """
    if len(losses) < _LEAST_STEPS // 2:
        raise UserError(f"{ended}, after {len(losses)} steps; set a smaller --low")
    smoothed = _smoothed(losses)
    lowest = int(np.argmin(smoothed))
    width = max(5, len(losses) // 10)
    slopes = [
        float(np.polyfit(np.log(rates[at : at + width]), losses[at : at + width], 1)[0])
        for at in range(max(0, lowest + 1 - width))
    ]
    if not slopes or min(slopes) >= 0:
        raise UserError(f"the loss never fell between {rates[0]:.3g} and {rates[-1]:.3g}; set a smaller --low")
    steepest = int(np.argmin(slopes)) + width // 2
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), rates[steepest], rates[lowest], ended)
