"""The training core as a one-worker trial: in the trial's own process, without a second group of workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spikefleet.config import load_config
from spikefleet.events import EpochDone, Event
from spikefleet.worker import train
from spikefleet.world import World
from spikefleet_pipelines.store import Store


class ReportOutlet:
    """Hands each epoch's figures to whoever schedules the trial."""

    def __init__(self, report: Callable[[Mapping[str, float]], None]) -> None:
        self._report = report

    def emit(self, event: Event) -> None:
        if isinstance(event, EpochDone):
            self._report({**event.metrics, "epoch": float(event.epoch)})


def as_trial(
    recipe: str, overrides: list[str], store: str, runs_dir: Path
) -> Callable[[Mapping[str, Any], str, Callable[[Mapping[str, float]], None]], dict[str, float]]:
    """A trainable (overrides of the trial, name, report) -> figures of the best checkpoint on val and test.

    A trial that is started again by the same name goes on from its last checkpoint.
    """
    folder = runs_dir.absolute()

    def trainable(
        point: Mapping[str, Any], name: str, report: Callable[[Mapping[str, float]], None]
    ) -> dict[str, float]:
        chosen = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        config = load_config(recipe, [*overrides, *chosen, "cluster.workers=0"])
        outcome = train(
            config,
            Store.open(store, verify=False),
            folder / name,
            World.alone(config.cluster.gpu),
            ReportOutlet(report),
        )
        figures = {f"val/{key}": value for key, value in outcome.validation.items()}
        return {**figures, **{f"test/{key}": value for key, value in outcome.test.items()}}

    return trainable
