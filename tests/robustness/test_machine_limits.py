"""What the machine lacks is said in a sentence with cause, figure and remedy."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray.exceptions import OutOfMemoryError
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cluster.failures import headline
from spikefleet.cluster.session import _not_started
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.errors import RunError, UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines import loading
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.reader import Store
from support.forked import Forked

RAY = """
import os, sys
from pathlib import Path
from spikefleet.cluster.session import ray_session
from spikefleet.errors import RunError, UserError
for place in sys.argv[1:]:
    os.environ["RAY_TMPDIR"] = place
    try:
        with ray_session():
            print("started")
    except (UserError, RunError) as error:
        print(type(error).__name__, error)
"""


def test_a_ray_that_does_not_start_is_a_sentence(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * (81 - len(str(tmp_path)) if len(str(tmp_path)) < 70 else 20))
    deep.mkdir()
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", RAY, deep, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    too_long, no_directory = done.stdout.splitlines()
    assert too_long.startswith("UserError Ray cannot start: the path of its socket")
    assert "107 are allowed; set RAY_TMPDIR, or TMPDIR, to a shorter directory" in too_long
    assert no_directory.startswith("RunError Ray did not start on this machine: ")
    assert "--workers 0" in no_directory


def test_the_figures_of_a_ray_that_does_not_start() -> None:
    sentence = _not_started(RuntimeError("The current node timed out during startup\nmore\nlines"))
    assert isinstance(sentence, RunError)
    assert "timed out during startup; " in str(sentence)
    assert f"for {os.cpu_count()} cores" in str(sentence)
    assert " GB of memory are free" in str(sentence)
    full = _not_started(OSError(28, "No space left on device", "/tmp/ray/x"))
    assert isinstance(full, UserError)
    assert "is full" in str(full)


def train_with_loaders(store: Path, run_dir: Path, slots: bool) -> None:
    """Trains in a mount namespace of its own, in which shared memory has 256 kB, less than a batch."""
    ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "/dev/shm"], check=True)
    settings = ["model.width=0.125", "train.epochs=1", "cluster.workers=0", "data.loader_processes=1"]
    config = load_config("digits", parse_overrides([*settings, "train.global_batch=1024"]))
    multiprocessing.set_start_method("fork", force=True)  # this process has that of the server that forked it
    if not slots:
        vars(loading)["SharedBatches"] = no_slots
    try:
        done = train(config, Store.open(store, verify=False), run_dir, ProcessGroup.single(), NullSink())
        print("steps:", done.steps)
    except StoreError as error:
        print(error)


def no_slots(*_: object) -> None:
    """As where the address space is limited."""
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("slots", [True, False])
def test_a_small_shared_memory_is_named_where_it_is_used(slots: bool, stores_dir: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a small /dev/shm cannot be mounted here")
    process = Forked(tmp_path / "said.txt", train_with_loaders, stores_dir / "digits", tmp_path / "run", slots)
    said = process.wait(120)
    assert process.returncode == 0, said
    if slots:  # batches, targets and indices need nothing of it
        assert said.strip() == "steps: 2", said
        return
    assert "more shared memory than there is in /dev/shm (0.2621 MB, " in said
    assert "data.loader_processes=0" in said


KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 14d4530964) "
    "was 6.41GB used / 23.54GB limit (0.272452)\n"
    "OOM kill reason: Memory usage 6787948544B exceeded threshold of 505530016B (2.0% of 25276502016B limit)\n"
    "Refer to the documentation on how to address the out of memory issue. Consider provisioning more memory."
)
"""What Ray 2.60 says; its memory monitor was set to 2 % of the machine's memory."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said_before_ray_starts(
    stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray starts"))
    (tmp_path / "s.yaml").write_text(
        "recipe: digits\nspace: {model.timesteps: {choice: [1]}}\nobjectives: {val/top1: max}\nbudget: {trials: 1}\n"
    )
    places = ["--stores-dir", str(stores_dir), "--runs-dir", str(tmp_path / "runs")]
    train, tune = ["train", "digits", "--gpu", "--workers", "2"], ["tune", str(tmp_path / "s.yaml")]
    for words, count in ((train, "2 GPUs"), ([*tune, "--gpus-per-worker", "0.5"], "0.5 GPUs")):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, *places])
        assert done.exit_code == 2, done.output
        assert f"needs {count} (one for each of cluster.workers), but this machine has 0" in done.stderr
        # Negative control: the cluster at an address may have them; nothing answers at this one.
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, *places, "--address", "127.0.0.1:1"])
        assert (done.exit_code, "nothing answers at Ray address" in done.stderr) == (2, True), done.output
    assert not (tmp_path / "runs").exists()


def test_the_memory_monitors_figures_are_kept() -> None:
    said = headline(OutOfMemoryError(KILLED))
    assert "6.41GB of 23.54GB in use, and Ray ends workers from 2.0% on" in said
    assert "lower train.global_batch" in said
    assert headline(RuntimeError("first\nthe last line says it")) == "the last line says it"


@pytest.mark.slow  # MLflow's server takes ten seconds to start
def test_ui_says_that_the_server_cannot_have_its_port(tmp_path: Path) -> None:
    """Another program takes the port after it was looked at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from spikefleet.cli import main; main()", "ui", "--port", str(port)]
    command += ["--runs-dir", str(tmp_path)]
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*mlflow.db*")):
        assert ui.poll() is None
        time.sleep(0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said, errors = ui.communicate(timeout=200)
    assert (ui.returncode, f"http://127.0.0.1:{port}" in said) == (1, False), said + errors
    assert f"before it answered at port {port}" in errors
