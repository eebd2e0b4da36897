"""What only Ray Train can answer: workers that die, the limit of restarts, a driver that dies, what workers refuse."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cluster.ray_train import Stopped, train_on_ray
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import RunError, UserError
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone, WorkerFailed
from spikefleet.training.step_reading import NonFiniteError
from spikefleet_pipelines.store.reader import Store
from support.forked import command
from support.ranks import GroupRun, run_ranks
from support.snapshots import assert_same_end, cut, differences, end_of

pytestmark = pytest.mark.xdist_group("ray")

SETTINGS = [
    "model.width=0.125",
    "train.epochs=2",
    "train.global_batch=216",
    "train.ema_decay=0.9",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "tracking.every_steps=1",
]
STEPS = 12


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


def config(workers: int, max_failures: int = 2) -> Config:
    cluster = [f"cluster.workers={workers}", f"cluster.max_failures={max_failures}"]
    return load_config("digits", parse_overrides([*SETTINGS, *cluster]))


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


def latest(run_dir: Path) -> str:
    path = CheckpointFolder(run_dir / "checkpoints").latest()
    assert path is not None
    return path.name


def undisturbed(workers: int, store: Store, run_dir: Path) -> GroupRun:
    """The same training in ranks that Ray knows nothing of."""
    run = run_ranks(config(workers), Path(store.absolute_location), run_dir)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    return run


def test_a_dead_worker_restarts_the_group_and_what_no_restart_can_heal_ends_it_with_its_sentence(
    ray_on_two_cpus: None, store: Store, tmp_path: Path
) -> None:
    """Also when one rank alone meets it, while the other waits for it. Up to there, every bit is the same."""

    def fault(group: ProcessGroup, at: int) -> None:
        mark = tmp_path / "killed"
        if (group.rank, at) == (1, 3) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        if (group.rank, at) == (1, 9):
            raise UserError("image 7.jpg is truncated; fetch it again")

    recorder = Recorder()
    with pytest.raises(UserError, match=r"^image 7.jpg is truncated; fetch it again$"):
        train_on_ray(config(2), store, tmp_path / "run", recorder, before_step=fault)
    assert (tmp_path / "killed").exists()
    assert len(recorder.restarts) == 2
    assert latest(tmp_path / "run") == "step-00000008"
    reference = undisturbed(2, store, tmp_path / "reference")
    assert recorder.losses == {step: reference.losses[step] for step in range(1, 10)}
    cut(tmp_path / "reference", 8, tmp_path / "until 8")
    assert differences(end_of(tmp_path / "run"), end_of(tmp_path / "until 8")) == []


def test_failures_beyond_the_limit_end_the_run(ray_on_two_cpus: None, store: Store, tmp_path: Path) -> None:
    def fault(group: ProcessGroup, at: int) -> None:
        if at == 5:
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), 9)

    with pytest.raises(RunError, match="max_failures"):
        train_on_ray(config(1, max_failures=0), store, tmp_path / "run", Recorder(), before_step=fault)
    assert (tmp_path / "killed").exists()
    assert latest(tmp_path / "run") == "step-00000004"


def test_why_a_group_stopped_is_the_error_of_its_kind() -> None:
    lost = Stopped("the loss is nan", mendable=False, non_finite=True).error()
    assert (type(lost), str(lost)) == (NonFiniteError, "the loss is nan")
    assert type(Stopped("image 7.jpg is truncated", mendable=True).error()) is UserError
    assert type(Stopped("the disk is full", mendable=False).error()) is RunError


@pytest.mark.slow  # test_resume.py has it without Ray; that a group returns why it stopped, the test of SIGTERM below
def test_a_loss_that_is_not_finite_ends_the_run_without_a_restart(
    ray_on_two_cpus: None, store: Store, tmp_path: Path
) -> None:
    def fault(group: ProcessGroup, at: int) -> None:
        if at == 2:
            from spikefleet.tasks.classification import Classification

            healthy = Classification.loss

            def poisoned(self, network, batch, balance):  # type: ignore[no-untyped-def]
                values = healthy(self, network, batch, balance)
                return {**values, "loss": values["loss"] * float("nan")}

            Classification.loss = poisoned  # type: ignore[assignment, method-assign]

    recorder = Recorder()
    with pytest.raises(RunError, match=r"the loss is nan at step 3 \(epoch 1\), on rank 0"):
        train_on_ray(config(1), store, tmp_path, recorder, before_step=fault)
    assert not recorder.restarts, "a restart cannot mend it"


def test_a_killed_driver_resumes_by_the_same_command(
    ray_on_two_cpus: None, store: Store, stores_dir: Path, tmp_path: Path
) -> None:
    """The whole program, with its own Ray and tracking; what MLflow gets is there exactly once."""
    words = ["train", "digits", *SETTINGS, "--workers", "1", "--name", "killed", "--runs-dir", str(tmp_path)]
    words += ["--stores-dir", str(stores_dir)]
    run_dir = tmp_path / "killed"
    first = command(tmp_path / "said.txt", *words)
    try:
        mark = run_dir / "checkpoints" / "step-00000004" / "checkpoint.json"
        wait_for(lambda: mark.exists() or first.returncode is not None)
        assert first.returncode is None, f"the run ended before it could be killed: {first.said}"
    finally:
        with suppress(ProcessLookupError):
            first.send(signal.SIGKILL)
        first.wait(20)
    assert latest(run_dir) != f"step-{STEPS:08d}", "killed too late to show anything"
    second = CliRunner().invoke(app, words)
    assert second.exit_code == 0, second.output
    assert "resuming from step-" in second.stdout
    clean = undisturbed(1, store, tmp_path / "reference")
    assert_same_end(run_dir, tmp_path / "reference")
    assert tracked_losses(tmp_path) == sorted(clean.losses.items())
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.01)


def test_sigterm_leaves_a_run_that_can_be_evaluated(ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path) -> None:
    """Sent to this process; `tests/robustness` sends it to one of its own."""
    run_dir = tmp_path / "interrupted"
    words = ["train", "digits", "--workers", "1", "--name", "interrupted", "train.epochs=300", "model.width=0.125"]

    def interrupt() -> None:
        try:
            wait_for(lambda: CheckpointFolder(run_dir / "checkpoints").latest())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    runner, runs = CliRunner(env={"COLUMNS": "200"}), ["--runs-dir", str(tmp_path)]
    done = runner.invoke(app, [*words, *runs, "--stores-dir", str(stores_dir)])
    thread.join()
    assert done.exit_code == 143, f"{done.output}\n{done.exception!r}"
    assert "stopping after this step; again to abort" in done.output
    assert "the same command resumes from the last checkpoint" in done.stderr
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["status"], record["signal"]) == ("interrupted", "SIGTERM")
    evaluated = runner.invoke(app, ["evaluate", "interrupted", *runs, "--data", str(stores_dir / "digits")])
    assert "top1" in evaluated.stdout, evaluated.output


def tracked_losses(runs_dir: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss"))
