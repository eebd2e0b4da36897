"""Trainings on the hosts of `support.hosts`: started, watched, and compared with a run without a fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.hosts import TOOLS, Cluster, Host, patience
from support.snapshots import differences, end_of

EPOCH, EPOCHS = 6, 8
STEPS = EPOCH * EPOCHS
SETTINGS = (
    "model.width=0.125",
    "model.timesteps=2",
    f"train.epochs={EPOCHS}",
    "train.global_batch=216",
    "train.ema_decay=0.9",
    "tracking.every_steps=1",
    "registry.register_best=false",
)
NAME = "run"
WORKER = "ray::RayTrainWorker"
_WORKER_TITLES = (WORKER, "ray::TrainWorker")
_PATIENCE_S = 120.0
_SETTLED_S = 0.3
"""After which the other worker stands still, too, in the next exchange of gradients."""


class Training:
    """A training of two workers, one on each host.

    Args:
        cluster: of the hosts.
        runs_dir: directory of runs, which all hosts see.
        stores_dir: likewise.
        more: overrides and options beside `SETTINGS`.
        workers: of the training.
        recipe: and its `settings`, and `steps`.
        environment: variables of the driver.
    """

    def __init__(
        self,
        cluster: Cluster,
        runs_dir: Path,
        stores_dir: Path,
        *more: str,
        workers: str = "2",
        recipe: str = "digits",
        settings: Sequence[str] = SETTINGS,
        steps: int = STEPS,
        **environment: str,
    ) -> None:
        self.cluster, self.runs_dir, self.run_dir = cluster, runs_dir, runs_dir / NAME
        self.recipe, self.steps = recipe, steps
        self.words = ["train", recipe, *settings, *more, "--workers", workers, "--name", NAME]
        self.words += ["--runs-dir", str(runs_dir), "--stores-dir", str(stores_dir)]
        self.environment = environment
        self.output = runs_dir / "output.txt"
        self.process: subprocess.Popen[str] | None = None
        self.database: str | None = None
        """URI of the database of a tracking server, if there is one."""

    def start(self) -> None:
        """Starts the driver on the head."""
        words = [str(TOOLS / "spikefleet"), *self.words, "--address", self.cluster.address]
        with self.output.open("a") as file:
            self.process = self.cluster.head.start(words, file, subprocess.STDOUT, **self.environment)

    @property
    def said(self) -> str:
        """What the driver has printed."""
        return self.output.read_text()

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        path = self.run_dir / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def step(self) -> int:
        """The latest step of the group of workers that started last, by its events; 0 if there is none."""
        groups = self.groups()
        return int(groups[-1][-1]["step"]) if groups else 0

    def groups(self) -> list[list[dict[str, Any]]]:
        """Start and steps of each group of workers, by its own events: the driver may know them later."""
        groups = []
        for path in sorted((self.run_dir / "ray").glob("*/events-*.jsonl")):
            try:
                lines = path.read_text().splitlines()
            except OSError:  # the attempt has ended
                continue
            events = [json.loads(line) for line in lines if line.endswith("}")]
            groups.append([event for event in events if event["event"] in ("Started", "StepDone")])
        return [group for group in groups if group]

    def wait_until(self, met: Callable[[], object], what: str, seconds: float = _PATIENCE_S) -> float:
        """Waits for a condition while the driver runs; returns the seconds that it took.

        Args:
            met: the condition.
            what: it is, for the message.
            seconds: that it may take on a quiet machine.
        """
        began = time.monotonic()
        while not met():
            assert self.process is not None
            assert self.process.poll() is None, f"the driver ended before {what}:\n{self.said}"
            assert time.monotonic() - began < patience(seconds), f"{what}: not within {seconds:.0f} s:\n{self.said}"
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is done, and the end is not reached."""
        self.wait_until(lambda: self.step() >= step, f"step {step}")
        assert self.step() < self.steps, "too late to show anything"

    def finish(self, code: int = 0, seconds: float = _PATIENCE_S) -> str:
        """Waits for the end of the driver; returns what it printed."""
        assert self.process is not None
        began = time.monotonic()
        while self.process.poll() is None:
            if time.monotonic() - began > patience(seconds):
                self.process.kill()
                raise AssertionError(f"the driver did not end within {seconds:.0f} s:\n{self.said}")
            time.sleep(0.05)
        assert self.process.returncode == code, f"exit code {self.process.returncode}:\n{self.said}"
        return self.said

    def end(self) -> None:
        """Kills the driver, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def send(self, signum: int) -> None:
        """Sends a signal to the driver."""
        assert self.process is not None
        os.kill(self.process.pid, signum)

    def losses(self) -> dict[int, float]:
        """The loss of each step, as MLflow has it."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.database or f"sqlite:///{self.runs_dir}/mlflow.db")
        experiment = client.get_experiment_by_name(self.recipe)
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert len(history) == len({metric.step for metric in history}), "each step is delivered once"
        return {metric.step: metric.value for metric in history}


def kill_worker(host: Host) -> None:
    """Kills the Ray Train worker of a host; it must be there."""
    for pid in workers_of(host):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def standing_still(host: Host) -> Iterator[None]:
    """Holds the worker of a host, for whom the others wait, while the block runs: a command takes seconds to start."""
    pids = workers_of(host)
    _send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        _send(signal.SIGCONT, pids)


@contextmanager
def standing_within_an_epoch(run: Training, host: Host) -> Iterator[None]:
    """Holds the worker of a host while the block runs, with at least two steps to do in the epoch and one done."""
    pids = workers_of(host)
    try:
        while True:
            _send(signal.SIGSTOP, pids)
            time.sleep(_SETTLED_S)
            if 1 <= run.step() % EPOCH <= EPOCH - 2:
                break
            assert run.step() < run.steps, "too late to show anything"
            _send(signal.SIGCONT, pids)
            time.sleep(_SETTLED_S / 100)
        yield
    finally:
        _send(signal.SIGCONT, pids)


def _send(signum: int, pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signum)


def workers_of(host: Host) -> list[int]:
    """Processes of the Ray Train worker of a host; there must be some."""
    pids = [pid for title in _WORKER_TITLES for pid in host.find(title)]
    assert pids, f"no worker on {host.name}"
    return pids


def assert_equal(run: Training, clean: Training) -> None:
    """Every loss and every bit of the last checkpoint are those of the run without a fault."""
    losses = run.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == clean.losses()
    assert differences(end_of(run.run_dir), end_of(clean.run_dir)) == []
