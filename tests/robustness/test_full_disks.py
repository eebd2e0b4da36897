"""Full and read-only disks (small tmpfs, which root mounts): a sentence that names the disk, nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.disks import disk_problem
from spikefleet.errors import RunError
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import run_training
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.atomic import write_atomically
from support.events import KeptEvents
from support.finished import NAME, SMALL


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _write_for_ever(descriptor: int) -> None:
    while True:
        os.write(descriptor, b"x" * 4096)


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "filling", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No space left"):
            _write_for_ever(descriptor)
    finally:
        os.close(descriptor)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


COMMANDS = {
    "predict": ("predict", NAME, "{image}", "--out", "{out}/p.png"),
    "evaluate": ("evaluate", NAME, "--split", "val", "--out", "{out}"),
    "energy": ("energy", NAME, "--images", "1", "--out", "{out}"),
    "spike-check": ("spike-check", NAME, "--measured", "0", "--out", "{out}/s.json"),
    "pull": ("registry", "pull", "sg_resnet_digits@champion", "--out", "{out}/pulled"),
    "prepare": ("data", "prepare", "digits", "--out", "{out}/store"),
}


@pytest.mark.parametrize("trouble", [fill, read_only])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_disk_is_named(
    command: str, trouble: Callable[[Path], None], disk: Path, finished: Path, stores_dir: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "a.png")
    trouble(disk)
    before = sorted(disk.iterdir())
    words = [word.format(image=tmp_path / "a.png", out=disk) for word in COMMANDS[command]]
    words += ["--runs-dir", str(finished)] if command != "prepare" else []
    words += ["--stores-dir", str(stores_dir)] if command not in ("predict", "pull", "prepare") else []
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words)
    said = " ".join(done.output.split())
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 2, said
    assert str(disk) in said
    reason = "is full" if trouble is fill else "is read-only"
    assert reason in said or (command == "prepare" and "space" in said), said
    assert sorted(disk.iterdir()) == before, "nothing is left half-written"


def test_pull_names_the_disk_of_its_scratch_directory(
    disk: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    fill(disk)
    words = ["registry", "pull", "sg_resnet_digits@champion", "--out", str(tmp_path / "p"), "--runs-dir", str(finished)]
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words)
    said = " ".join(done.output.split())
    assert done.exit_code == 2, said
    assert f"the disk at {disk} is full" in said
    assert not (tmp_path / "p").exists()


def test_a_training_on_a_full_disk_ends_with_a_sentence(
    disk: Path, stores_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikefleet.runs.train_run._FLUSH_S", 1.0)  # nothing is delivered
    config, options = load_config("digits", parse_overrides(SMALL)), Options(disk / "runs", stores_dir)
    with pytest.raises((RunError, OSError)) as caught:
        run_training(config, options, Console(quiet=True), NAME)
    error = caught.value
    said = disk_problem(error) if isinstance(error, OSError) else str(error)
    assert f"the disk at {disk} is full" in str(said)


def test_a_plot_that_fails_does_not_end_the_training(
    stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    from spikefleet import plots

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots, "image_grid", full)
    events = KeptEvents()
    config, store = load_config("digits", parse_overrides(SMALL)), Store.open(stores_dir / "digits", verify=False)
    assert train(config, store, tmp_path / "run", ProcessGroup.single(), events).test["top1"] > 0
    drawn = [text for text in events.notes if "was not drawn" in text]
    assert [text.split()[2] for text in drawn] == ["training_batch.png", "predictions.png"]
    assert all("is full" in text for text in drawn)


def test_other_errors_are_not_taken_for_a_disk(tmp_path: Path) -> None:
    assert disk_problem(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert disk_problem(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
    assert disk_problem(ValueError("28")) is None
    assert "no permission" in str(disk_problem(PermissionError(errno.EACCES, "denied", "x")))
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "x.json", "{}")
    assert caught.value.filename == str(tmp_path / "none" / "x.json")
