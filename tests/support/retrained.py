"""A desk with a champion on digits, for tests of retraining."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet import registry
from spikefleet.config.recipes import load_config
from spikefleet.retraining.plan import Request
from spikefleet.retraining.record import Record, RetrainingFolder, Retrainings
from spikefleet.retraining.retrain import Retrained, retrain
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import FinishedRun, run_training
from spikefleet.tracking.mlflow_client import resolve_tracking_uri

MODEL = "sg_resnet_digits"
SMALL: dict[str, Any] = {
    "model.width": 0.125,
    "cluster.workers": 0,
    "train.global_batch": 32,
    "train.epochs": 2,
}


@dataclass(frozen=True)
class Desk:
    """A runs directory with a champion of two epochs, and the data it was trained on, with a gate split."""

    root: Path

    @property
    def options(self) -> Options:
        return Options(self.root / "runs", self.root / "stores")

    @property
    def uri(self) -> str:
        return resolve_tracking_uri(self.options.runs_dir)

    def train(self, name: str, **overrides: Any) -> FinishedRun:
        console = Console(file=StringIO())
        given = {**SMALL, "data.store": str(self.root / "stores" / "split"), "retrain.gate_store": "split", **overrides}
        return run_training(load_config("digits", given), self.options, console, name)

    def retrain(
        self, force: bool = False, start: Any = "scratch", data: str | None = None, **overrides: Any
    ) -> Retrained:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return retrain(Request(MODEL, dotted, start, data, force), self.options, Console(file=StringIO()))

    def aliases(self) -> dict[str, int]:
        versions = registry.show(MODEL, tracking_uri=self.uri).versions
        return {alias: version.version for version in versions for alias in version.aliases}

    def copy(self, to: Path) -> Desk:
        """The same runs directory in another place; its database follows."""
        shutil.copytree(self.root, to, symlinks=True)
        return Desk(to)


def record_of(desk: Desk, outcome: Retrained) -> Record:
    assert outcome.id is not None
    record = RetrainingFolder(Retrainings(desk.options.runs_dir).path / outcome.id).read()
    assert record is not None
    return record
