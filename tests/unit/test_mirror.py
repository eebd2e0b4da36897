"""checkpoint.mirror: a run whose directory is lost resumes from the copies, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import run_training
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import CheckpointSaved, Event, Note
from spikefleet.training.loop import train
from spikefleet.training.mirror import Mirror, MirroringSink, mirrored
from spikefleet.training.stopping import TrainingStopped
from spikefleet_pipelines.store.reader import Store
from support.snapshots import assert_same_end, small_snapshot

SETTINGS = ["model.width=0.125", "train.epochs=2", "train.global_batch=216", "cluster.workers=0"]
STEPS = 12


class Heard:
    """Keeps the notes, and asks to stop after the first checkpoint."""

    def __init__(self, stop: bool = False) -> None:
        self.notes: list[str] = []
        self.stop, self.asked = stop, False

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        if isinstance(event, CheckpointSaved):
            self.asked = self.stop

    def requested(self) -> bool:
        return self.asked


def config(mirror: Path | None) -> Config:
    overrides = parse_overrides(SETTINGS)
    return load_config(
        "digits", overrides if mirror is None else {**overrides, "checkpoint.mirror": f"file://{mirror}"}
    )


def run(config: Config, stores_dir: Path, run_dir: Path, heard: Heard) -> None:
    store = Store.open(stores_dir / "digits", verify=False)
    train(config, store, run_dir, ProcessGroup.single(), heard, stop_requested=heard.requested)


def test_a_run_whose_directory_is_lost_resumes_from_the_mirror(
    stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    run(config(None), stores_dir, tmp_path / "clean" / "run", Heard())
    mirror, first = tmp_path / "mirror", tmp_path / "first" / "run"
    with pytest.raises(TrainingStopped) as stopped:
        run(config(mirror), stores_dir, first, Heard(stop=True))
    assert 0 < stopped.value.step < STEPS
    shutil.rmtree(first)
    heard, second = Heard(), tmp_path / "second" / "run"
    run(config(mirror), stores_dir, second, heard)
    assert f"step-{stopped.value.step:08d} was fetched from file://{mirror}" in heard.notes
    assert_same_end(second, tmp_path / "clean" / "run")
    kept = CheckpointFolder(mirror / "run" / "checkpoints").committed()
    assert [path.name for path in kept] == [path.name for path in CheckpointFolder(second / "checkpoints").committed()]
    assert_same_end(mirror / "run", second)


def test_the_mirror_holds_what_the_folder_holds_and_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    folder, mirror = CheckpointFolder(tmp_path / "run" / "checkpoints"), Mirror(f"file://{tmp_path}/mirror", "run")
    for step in (2, 4):
        folder.save(step, small_snapshot())
    mirror.keep(folder)
    copies = tmp_path / "mirror" / "run" / "checkpoints"
    assert sorted(path.name for path in copies.iterdir()) == ["step-00000002", "step-00000004"]
    shutil.rmtree(folder.at(2))
    folder.save(6, small_snapshot())
    mirror.keep(folder)
    assert sorted(path.name for path in copies.iterdir()) == ["step-00000004", "step-00000006"]
    (copies / "step-00000006" / "checkpoint.json").unlink()  # as if the copy had been cut short
    fresh = CheckpointFolder(tmp_path / "fresh" / "checkpoints")
    assert mirror.restore(fresh) == ["step-00000004"]
    assert mirror.restore(fresh) == [], "a folder that has checkpoints keeps them"
    mirror.keep(folder)
    assert mirror.restore(CheckpointFolder(tmp_path / "third" / "checkpoints")) == ["step-00000004", "step-00000006"]


def test_a_damaged_copy_is_refused_and_a_mirror_that_is_away_costs_a_note(tmp_path: Path) -> None:
    folder, mirror = CheckpointFolder(tmp_path / "run" / "checkpoints"), Mirror(f"file://{tmp_path}/mirror", "run")
    folder.save(2, small_snapshot())
    mirror.keep(folder)
    copied = tmp_path / "mirror" / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    copied.write_bytes(copied.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"model.safetensors"):
        mirrored(f"file://{tmp_path}/mirror", tmp_path / "fresh" / "run", Heard())
    heard = Heard()
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").write_text("no directory")
    MirroringSink(heard, mirror, folder).emit(CheckpointSaved(2, str(folder.at(2))))
    (note,) = heard.notes
    assert "did not take the checkpoint of step 2, the next one tries again" in note


@pytest.mark.parametrize("uri", ["nothing", "gopher://x/y", "s3://me:secret@bucket/x"])
def test_a_mirror_that_cannot_be_one_is_refused(uri: str, stores_dir: Path, tmp_path: Path) -> None:
    def begin() -> None:
        wanted = load_config("digits", {**parse_overrides(SETTINGS), "checkpoint.mirror": uri})
        run_training(wanted, Options(tmp_path / "runs", stores_dir), Console(quiet=True))

    with pytest.raises(UserError, match=r"checkpoint.mirror"):
        begin()
    assert not list(tmp_path.glob("runs/*/run.json"))


def test_a_runs_directory_with_a_scheme_is_refused_with_the_mirror(stores_dir: Path, tmp_path: Path) -> None:
    words = ["train", "digits", "--runs-dir", "s3://bucket/runs", "--stores-dir", str(stores_dir), "--workers", "0"]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert done.exit_code == 2
    assert "--runs-dir s3://bucket/runs is no directory" in done.output
    assert "checkpoint.mirror=s3://bucket/runs" in done.output
    assert not Path("s3:").exists()
