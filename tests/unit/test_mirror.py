"""checkpoint.mirror: a run whose directory is lost resumes from the copies, bit by bit."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.runs.train_run import _mirror_report, run_training
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import CheckpointSaved, Event, EventSink, Note
from spikefleet.training.loop import train
from spikefleet.training.mirror import Mirror, MirroringSink, mirrored
from spikefleet.training.mirror_owner import Owner, user_name
from spikefleet.training.stopping import TrainingStopped
from spikefleet_pipelines.store.reader import Store
from support.ranks import run_ranks
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
    assert [note for note in heard.notes if "belonged to the run of" in note and str(first) in note]
    assert f"step-{stopped.value.step:08d} was fetched from file://{mirror}" in heard.notes
    assert_same_end(second, tmp_path / "clean" / "run")
    kept = CheckpointFolder(mirror / "run" / "checkpoints").committed()
    assert not [note for note in heard.notes if "did not take" in note]
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
    with pytest.raises(UserError, match=r"no checkpoint in file://.*/run is intact: .*model.safetensors") as none:
        opened(tmp_path, "fresh", Heard())
    assert "partial-" not in str(none.value), "the local copy is gone"
    heard = Heard()
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").write_text("no directory")
    MirroringSink(heard, mirror, folder, Owner.of(tmp_path / "run")).emit(CheckpointSaved(2, str(folder.at(2))))
    (note,) = heard.notes
    assert "did not take the checkpoint of step 2, the next one tries again" in note


def test_a_copy_that_fails_costs_none_that_is_there(tmp_path: Path) -> None:
    folder, mirror = CheckpointFolder(tmp_path / "run" / "checkpoints"), Mirror(f"file://{tmp_path}/mirror", "run")
    folder.save(2, small_snapshot())
    mirror.keep(folder)
    folder.save(4, small_snapshot())
    folder.prune(1, set())
    blocked = tmp_path / "mirror" / "run" / "checkpoints" / "step-00000004"
    blocked.write_text("a file where the copy wants a directory")
    with pytest.raises(OSError, match=r"step-00000004"):
        mirror.keep(folder)
    assert mirror.restore(CheckpointFolder(tmp_path / "fresh" / "checkpoints")) == ["step-00000002"]
    blocked.unlink()
    mirror.keep(folder)
    assert mirror.restore(CheckpointFolder(tmp_path / "other" / "checkpoints")) == ["step-00000004"]


def test_a_damaged_copy_is_left_out_and_written_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    for step in (2, 4, 6):
        folder.save(step, small_snapshot())
    Mirror(f"file://{tmp_path}/mirror", "run").keep(folder)
    copied = tmp_path / "mirror" / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    whole = copied.read_bytes()
    copied.write_bytes(whole[:-1] + b"x")
    heard, fresh = Heard(), CheckpointFolder(tmp_path / "fresh" / "run" / "checkpoints")
    sink = opened(tmp_path, "fresh", heard)
    assert [path.name for path in fresh.committed()] == ["step-00000002", "step-00000004"]
    (damage,) = [note for note in heard.notes if note.endswith("it was left out")]
    assert f"file://{tmp_path}/mirror/run/checkpoints/step-00000006/model.safetensors is damaged" in damage
    assert heard.notes[-1] == f"step-00000004 was fetched from file://{tmp_path}/mirror"
    shutil.copytree(folder.at(6), fresh.at(6))  # trained again, with the same manifest
    sink.emit(CheckpointSaved(6, ""))
    assert copied.read_bytes() == whole


def test_the_best_checkpoint_of_a_finished_training_is_fetched_with_the_last_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    for step in (2, 4):
        folder.save(step, small_snapshot(best_step=2))  # two epochs, the whole training
    Mirror(f"file://{tmp_path}/mirror", "run").keep(folder)
    copies = tmp_path / "mirror" / "run" / "checkpoints"
    (copies / "step-00000002" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint before it can be used: set another --name"):
        opened(tmp_path, "fresh", Heard())
    assert opened(tmp_path, "longer", Heard(), epochs=3), "in the middle of a training the best one is chosen anew"


def opened(tmp_path: Path, directory: str, heard: Heard, epochs: int = 2) -> EventSink:
    """The sink of the run `run` in a directory, with the mirror in `mirror`."""
    return mirrored(f"file://{tmp_path}/mirror", tmp_path / directory / "run", ProcessGroup.single(), heard, epochs)


def test_a_mirror_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Heard(), Heard()
    folder = CheckpointFolder(tmp_path / "first" / "run" / "checkpoints")
    other = CheckpointFolder(tmp_path / "second" / "run" / "checkpoints")
    sink = opened(tmp_path, "first", first)
    for step in (2, 4):
        folder.save(step, small_snapshot())
        sink.emit(CheckpointSaved(step, ""))
    assert first.notes == []
    monkeypatch.setenv("LOGNAME", "somebody-else")
    with pytest.raises(UserError, match=r"mirror/run belongs to the run of .*:.*first/run, which wrote it last at 20"):
        opened(tmp_path, "second", second)
    assert other.committed() == [], "nothing of another user's run is resumed"
    monkeypatch.undo()
    taken = opened(tmp_path, "second", second)  # the same user's
    assert second.notes[-1].startswith("step-00000004 was fetched")
    assert "belonged to the run of" in second.notes[0]
    folder.save(6, small_snapshot())
    folder.prune(1, set())
    sink.emit(CheckpointSaved(6, ""))
    assert "did not take the checkpoint of step 6" in first.notes[0]
    assert f"mirror/run now belongs to the run of {user_name()} in" in first.notes[0]
    taken.emit(CheckpointSaved(4, ""))
    copies = CheckpointFolder(tmp_path / "mirror" / "run" / "checkpoints")
    assert [path.name for path in copies.committed()] == ["step-00000002", "step-00000004"], "the first one's are kept"
    with pytest.raises(UserError, match=r"mirror/run belongs to .*second/run.*; set another --name"):
        opened(tmp_path, "first", first)
    assert len(second.notes) == 2


def test_newer_steps_than_the_own_latest_are_never_removed(tmp_path: Path) -> None:
    folder, mirror = CheckpointFolder(tmp_path / "run" / "checkpoints"), Mirror(f"file://{tmp_path}/mirror", "run")
    for step in (2, 4, 6):
        folder.save(step, small_snapshot())
    mirror.keep(folder)
    shutil.rmtree(folder.at(6))
    shutil.rmtree(folder.at(2))
    mirror.keep(folder)
    copies = CheckpointFolder(tmp_path / "mirror" / "run" / "checkpoints")
    assert [path.name for path in copies.committed()] == ["step-00000004", "step-00000006"]


def test_a_run_of_the_same_name_elsewhere_is_refused_before_it_starts(
    stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "shared"
    elsewhere = Run(tmp_path / "elsewhere" / name)
    elsewhere.path.mkdir(parents=True)
    elsewhere.note(status="running", id="an id", user="somebody-else")
    Mirror(f"file://{tmp_path}/mirror", name).claim(Owner.of(elsewhere.path))
    wanted, options = config(tmp_path / "mirror"), Options(tmp_path / "runs", stores_dir)
    with pytest.raises(UserError, match=r"belongs to the run of somebody-else in .*elsewhere/shared"):
        run_training(wanted, options, Console(quiet=True), name=name)
    assert not list(tmp_path.glob("runs/*/run.json"))


def test_all_ranks_raise_what_keeps_rank_0_from_its_mirror(stores_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("no directory")
    (tmp_path / "run").mkdir()
    wanted = load_config(
        "digits", {**parse_overrides(SETTINGS), "cluster.workers": 2, "checkpoint.mirror": f"file://{tmp_path}/mirror"}
    )
    errors = run_ranks(wanted, stores_dir / "digits", tmp_path / "run").errors
    assert [type(error) for error in errors] == [UserError, UserError]
    assert all("/mirror cannot be used: " in str(error) for error in errors)


@pytest.mark.parametrize("uri", ["nothing", "gopher://x/y", "s3://me:secret@bucket/x"])
def test_a_mirror_that_cannot_be_one_is_refused(uri: str, stores_dir: Path, tmp_path: Path) -> None:
    def begin() -> None:
        wanted = load_config("digits", {**parse_overrides(SETTINGS), "checkpoint.mirror": uri})
        run_training(wanted, Options(tmp_path / "runs", stores_dir), Console(quiet=True))

    with pytest.raises(UserError, match=r"checkpoint.mirror"):
        begin()
    assert not list(tmp_path.glob("runs/*/run.json"))


def test_a_runs_directory_with_a_scheme_is_refused_with_the_mirror(stores_dir: Path, tmp_path: Path) -> None:
    config = load_config("digits", parse_overrides(SETTINGS))
    with pytest.raises(UserError, match=r"checkpoint\.mirror=s3://bucket/runs to keep"):
        run_training(config, Options(Path("s3://bucket/runs"), stores_dir), Console(quiet=True))
    for words in ("train digits --workers 0", "tune digits_t_gate_schedule", "retrain m", "status", "registry list"):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words.split(), "--runs-dir", "s3://bucket/runs"])
        assert done.exit_code == 2, words
        assert "--runs-dir s3://bucket/runs is no directory of this machine" in done.output
        assert "checkpoint.mirror=s3://bucket/runs" in done.output
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", "prepare", "digits", "--stores-dir", "s3://b/stores"])
    assert (done.exit_code, "data.store=s3://b/stores/NAME" in done.output) == (2, True)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", "prepare", "digits", "--out", "s3://b/stores/digits"])
    assert (done.exit_code, "--out s3://b/stores/digits is no directory" in done.output) == (2, True)
    assert not Path("s3:").exists()


class CloudError(Exception):
    """What a file system of a cloud may raise."""


def test_what_is_no_error_of_the_system_keeps_rank_0_from_its_mirror_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise CloudError("the credentials have expired")

    monkeypatch.setattr(Mirror, "owner", fails)
    with pytest.raises(UserError, match="cannot be used: the credentials have expired; check access"):
        opened(tmp_path, "first", Heard())
    said, run = StringIO(), Run(tmp_path / "run")
    _mirror_report(config(tmp_path / "mirror"), run, Console(file=said, width=300))
    assert "did not take the report: the credentials have expired" in said.getvalue()
