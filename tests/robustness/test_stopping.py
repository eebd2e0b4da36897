"""SIGTERM and Ctrl-C stop a training after its step, with a checkpoint from which it resumes bit by bit."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, Phase, StepDone
from spikefleet.training.loop import train
from spikefleet.training.stopping import TrainingStopped
from spikefleet_pipelines.store.reader import Store
from support.forked import Forked, command
from support.ranks import GroupRun, ask_to_stop, run_ranks
from support.snapshots import assert_same_end

SETTINGS = [
    "model.width=0.125",
    "train.epochs=2",
    "train.global_batch=216",
    "train.ema_decay=0.9",
    "checkpoint.every_epochs=2",
    "tracking.every_steps=1",
]
EPOCH, STEPS = 6, 12


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Path:
    return stores_dir / "digits"


class AskAt:
    """An event sink that asks to stop when it sees an event."""

    def __init__(self, *moments: int | str) -> None:
        self.moments, self.asked, self.losses = list(moments), False, dict[int, float]()

    def emit(self, event: Event) -> None:
        moment = event.step if isinstance(event, StepDone) else event.what if isinstance(event, Phase) else None
        if isinstance(event, StepDone):
            self.losses[event.step] = event.metrics["train/loss"]
        if moment in self.moments:
            self.moments.remove(moment)
            self.asked = True

    def requested(self) -> bool:
        return self.asked


def config(workers: int) -> Config:
    return load_config("digits", parse_overrides([*SETTINGS, f"cluster.workers={workers}"]))


def train_through(run_dir: Path, store: Path, asker: AskAt) -> list[int]:
    """Trains and resumes to the end; the steps at which it stopped."""
    stops = []
    while True:
        opened = Store.open(store, verify=False)
        try:
            train(config(0), opened, run_dir, ProcessGroup.single(), asker, stop_requested=asker.requested)
        except TrainingStopped as stopped:
            stops.append(stopped.step)
            asker.asked = False
        else:
            return stops


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AskAt]:
    run_dir, asker = tmp_path_factory.mktemp("undisturbed") / "run", AskAt()
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        assert train_through(run_dir, store, asker) == []
    return run_dir, asker


def without_figures(patch: pytest.MonkeyPatch) -> None:
    from spikefleet import plots
    from support.figures import DRAWN, nothing

    for name in DRAWN:
        patch.setattr(plots, name, nothing)


def test_a_stop_at_any_moment_changes_no_bit(
    undisturbed: tuple[Path, AskAt], store: Path, tmp_path: Path, no_figures: None
) -> None:
    """Within an epoch, after its last step, while it is validated, and while the best checkpoint is tested."""
    reference, clean = undisturbed
    asker = AskAt(2, EPOCH - 1, "validating", "testing")
    stops = train_through(tmp_path / "run", store, asker)
    assert stops == [3, EPOCH, EPOCH, STEPS], "each stop comes after the step in which it was asked for"
    assert asker.losses == clean.losses
    assert_same_end(tmp_path / "run", reference)


def test_two_ranks_agree_on_the_step(store: Path, tmp_path: Path) -> None:
    """Rank 0 is asked; a request that only the other one could see is seen a step later, by both."""
    clean = run_ranks(config(2), store, tmp_path / "clean")
    plan = [ask_to_stop(1, 3), ask_to_stop(0, EPOCH - 1)]
    run = run_ranks(config(2), store, tmp_path / "run", plan, prepare=partial(stop_validation, tmp_path / "once"))
    assert [set(codes) for codes in run.exit_codes] == [{1}] * 3 + [{0}]
    assert all(isinstance(error, TrainingStopped) or error is None for error in run.errors)
    assert run.losses == clean.losses
    assert_same_end(tmp_path / "run", tmp_path / "clean")
    assert isinstance(clean, GroupRun)
    assert (tmp_path / "once").exists()


def stop_validation(mark: Path) -> None:
    """Rank 0 alone is asked to stop in the second validation."""
    from torch import distributed as dist

    from spikefleet.training import loop

    evaluate = loop.evaluate  # type: ignore[attr-defined]

    def asked(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == 0 and not mark.exists():
            mark.touch()
            options["stop_requested"] = lambda: True
        return evaluate(*arguments, **options)

    loop.evaluate = asked  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ real signals


def start(folder: Path, stores_dir: Path, *words: str) -> Forked:
    settings = ["train.epochs=300", "model.width=0.125", "checkpoint.every_steps=7", "checkpoint.every_epochs=300"]
    places = ["--runs-dir", str(folder), "--stores-dir", str(stores_dir)]
    return command(folder / "said.txt", "train", "digits", "--name", "r", *places, *settings, *words)


def wait_until_it_trains(process: Forked, folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.glob("r/checkpoints/step-*/checkpoint.json")):
        assert process.returncode is None, process.said
        assert time.monotonic() < deadline
        time.sleep(0.02)


def latest_step(folder: Path) -> int:
    latest = CheckpointFolder(folder / "r" / "checkpoints").latest()
    assert latest is not None
    return int(latest.name.removeprefix("step-"))


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])  # slow: a process of its own
def test_sigterm_without_ray(twice: bool, stores_dir: Path, tmp_path: Path) -> None:
    process = start(tmp_path, stores_dir, "--workers", "0")
    wait_until_it_trains(process, tmp_path)
    process.send(signal.SIGTERM)
    if twice:
        process.send(signal.SIGTERM)
    said = process.wait(60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    if not twice:  # of two signals, the second may come before the sentence
        assert "stopping after this step; again to abort" in said
        assert latest_step(tmp_path) >= 7
    assert "the same command resumes from the last checkpoint" in said
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["status"], record["signal"]) == ("interrupted", "SIGTERM")


@pytest.mark.slow  # a Ray of its own for each; tests/integration/test_ray_train.py sends SIGTERM
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_with_ray(signum: int, code: int, stores_dir: Path, tmp_path: Path) -> None:
    process = start(tmp_path, stores_dir, "--workers", "1")
    wait_until_it_trains(process, tmp_path)
    process.send(signum)
    said = process.wait(120)
    assert process.returncode == code, said
    assert "stopping after this step; again to abort" in said
    assert "Traceback" not in said
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["status"], record["signal"]) == ("interrupted", signal.Signals(signum).name)
    assert status_in_mlflow(tmp_path) == "KILLED"


def test_a_signal_while_ray_starts(stores_dir: Path, tmp_path: Path) -> None:
    process = start(tmp_path, stores_dir, "--workers", "1")
    deadline = time.monotonic() + 120
    while not any(b"gcs_server" in line or b"raylet" in line for line in command_lines(process.pid)):
        assert process.returncode is None, process.said
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send(signal.SIGTERM)
    said = process.wait(60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert not (tmp_path / "r").exists()


def command_lines(parent: int) -> list[bytes]:
    """Command lines of the children of a process."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = []
    for child in children:
        try:
            found.append(Path(f"/proc/{child}/cmdline").read_bytes())
        except OSError:
            continue
    return found


def status_in_mlflow(runs: Path) -> str:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(runs / "mlflow.db")) as database:
        return str(database.execute("SELECT status FROM runs").fetchone()[0])
