"""A run that is killed and resumed gives, bit for bit, what the run that was never killed gives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikefleet.cluster.ray_train import train_on_ray
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import RunError, UserError
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone, WorkerFailed
from spikefleet_pipelines.store.reader import Store

SETTINGS = [
    "model.width=0.125",
    "train.epochs=2",
    "train.ema_decay=0.9",
    "train.clip_norm=1.0",
    "checkpoint.every_steps=4",
    "tracking.every_steps=1",
    "cluster.workers=2",
]
STEPS = 42

Fault = Callable[[ProcessGroup, int], None]


def kill(*, rank: int, step: int, mark: Path) -> Fault:
    """SIGKILLs one worker before one step, once; the mark shows that it happened."""

    def fault(group: ProcessGroup, at: int) -> None:
        if group.rank == rank and at == step and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def poison_loss(*, rank: int, step: int) -> Fault:
    """Makes the loss of one rank NaN from one step on."""

    def fault(group: ProcessGroup, at: int) -> None:
        if group.rank == rank and at == step:
            from spikefleet.tasks.classification import Classification

            healthy = Classification.loss

            def poisoned(self, network, batch, balance):  # type: ignore[no-untyped-def]
                values = healthy(self, network, batch, balance)
                return {**values, "loss": values["loss"] * float("nan")}

            Classification.loss = poisoned  # type: ignore[method-assign]

    return fault


def every(*faults: Fault) -> Fault:
    def fault(group: ProcessGroup, at: int) -> None:
        for one in faults:
            one(group, at)

    return fault


class Recorder:
    """Keeps the loss of each step, as last reported, and the restarts."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.restarts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.losses[event.step] = event.metrics["train/loss"]
        if isinstance(event, WorkerFailed):
            self.restarts.append(event.reason)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", parse_overrides(SETTINGS))


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


@pytest.fixture(scope="module")
def undisturbed(
    config: Config, store: Store, ray_on_two_cpus: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recorder]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    recorder = Recorder()
    train_on_ray(config, store, run_dir, recorder)
    assert sorted(recorder.losses) == list(range(1, STEPS + 1))
    assert not recorder.restarts
    return run_dir, recorder


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """The last checkpoints agree in every bit: weights, average, optimizer, random states, position, history."""
    found, wanted = (CheckpointFolder(path / "checkpoints").latest() for path in (run_dir, reference))
    assert found is not None
    assert wanted is not None
    assert found.name == wanted.name == f"step-{STEPS:08d}"
    ours, theirs = load_checkpoint(found), load_checkpoint(wanted)
    assert ours.tensors.keys() == theirs.tensors.keys() == {"model", "average", "optimizer", "random"}
    for group, tensors in theirs.tensors.items():
        assert ours.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(ours.tensors[group][name], tensor), f"{group}: {name}"
    assert ours.state == theirs.state


def test_killed_workers_change_no_bit(
    config: Config, store: Store, undisturbed: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """Three kills of one run: of either rank, at steps with and without a checkpoint just before."""
    reference, clean = undisturbed
    choice = random.Random(1)
    steps = sorted(choice.sample(range(1, STEPS), 3))
    marks = [tmp_path / f"killed-{step}" for step in steps]
    faults = [kill(rank=choice.randrange(2), step=step, mark=mark) for step, mark in zip(steps, marks, strict=True)]
    recorder = Recorder()
    train_on_ray(config, store, tmp_path / "run", recorder, before_step=every(*faults))
    assert all(mark.exists() for mark in marks), "a planned fault did not fire"
    assert len(recorder.restarts) == 3
    assert recorder.losses == clean.losses
    assert_same_end(tmp_path / "run", reference)


def test_non_finite_loss_stops_every_rank_before_the_update(
    config: Config, store: Store, undisturbed: tuple[Path, Recorder], tmp_path: Path
) -> None:
    reference, clean = undisturbed
    recorder = Recorder()
    with pytest.raises(RunError, match=r"the loss is nan at step 15 \(epoch 1\), on rank 1"):
        train_on_ray(config, store, tmp_path, recorder, before_step=poison_loss(rank=1, step=14))
    assert not recorder.restarts, "a restart cannot mend it"
    latest = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert latest is not None
    assert latest.name == "step-00000012"
    train_on_ray(config, store, tmp_path, recorder)
    assert recorder.losses == clean.losses
    assert_same_end(tmp_path, reference)


def test_failures_beyond_the_limit_end_the_run(
    config: Config, store: Store, ray_on_two_cpus: None, tmp_path: Path
) -> None:
    frail = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failures": 0})})
    mark = tmp_path / "killed"
    with pytest.raises(RunError, match="max_failures"):
        train_on_ray(frail, store, tmp_path, Recorder(), before_step=kill(rank=0, step=6, mark=mark))
    assert mark.exists()
    latest = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert latest is not None
    assert latest.name == "step-00000004"


def test_what_no_restart_can_heal_ends_the_run_with_its_sentence(
    config: Config, store: Store, ray_on_two_cpus: None, tmp_path: Path
) -> None:
    """Also when one rank alone meets it, while the others wait for its gradients."""

    def fault(group: ProcessGroup, at: int) -> None:
        if group.rank == 1 and at == 6:
            raise UserError("picture 7.jpg is truncated; fetch it again")

    recorder = Recorder()
    with pytest.raises(UserError, match=r"^picture 7.jpg is truncated; fetch it again$"):
        train_on_ray(config, store, tmp_path, recorder, before_step=fault)
    assert len(recorder.restarts) == 1


def test_killed_driver_resumes_by_the_same_command(
    stores_dir: Path, undisturbed: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """The whole program, with its own Ray and tracking; what MLflow gets is there exactly once."""
    reference, clean = undisturbed
    command = [str(Path(sys.executable).with_name("spikefleet")), "train", "digits", *SETTINGS, "--name", "killed"]
    command += ["--runs-dir", str(tmp_path), "--stores-dir", str(stores_dir)]
    run_dir = tmp_path / "killed"
    # MLflow leaves the last URI of an earlier test in the environment.
    clean_environment = {key: value for key, value in os.environ.items() if "MLFLOW_TRACKING" not in key}
    first = subprocess.Popen(command, env=clean_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "step-00000012" / "checkpoint.json").exists():
            assert first.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    latest = CheckpointFolder(run_dir / "checkpoints").latest()
    assert latest is not None
    assert latest.name != f"step-{STEPS:08d}", "killed too late to show anything"
    second = subprocess.run(command, env=clean_environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "resuming from step-" in second.stdout
    assert_same_end(run_dir, reference)
    assert tracked_losses(tmp_path) == sorted(clean.losses.items())
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


def tracked_losses(runs_dir: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss"))
