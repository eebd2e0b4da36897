"""checkpoint.mirror on an S3-compatible server: moto, in a process of its own, which answers as S3 does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileSystem, FileType

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.checkpoints import MANIFEST, CheckpointFolder
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import CheckpointSaved, Event, Note
from spikefleet.training.loop import train
from spikefleet.training.mirror import Mirror
from spikefleet.training.stopping import TrainingStopped
from spikefleet_pipelines.store.reader import Store
from support.snapshots import assert_same_end, small_snapshot

BUCKET = "trainings"
_START_S = 120.0
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SETTINGS = ["model.width=0.125", "train.epochs=2", "train.global_batch=216", "cluster.workers=0"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of an S3 server with one bucket."""
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "log.txt"
    with log.open("w") as output, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=output, stderr=output, env={**os.environ}
        )
        try:
            deadline = time.monotonic() + _START_S
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            FileSystem.from_uri(f"{uri(f'127.0.0.1:{port}', '')}&allow_bucket_creation=true")[0].create_dir(BUCKET)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def uri(server: str, folder: str, bucket: str = BUCKET) -> str:
    return f"s3://{bucket}{folder}?endpoint_override={server}&scheme=http&region=eu-central-1"


def names(server: str, folder: str) -> list[str]:
    files, place = FileSystem.from_uri(uri(server, folder))
    found = files.get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
    return sorted(entry.path.removeprefix(f"{place}/") for entry in found if entry.type == FileType.File)


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


def run(config: Config, stores_dir: Path, run_dir: Path, heard: Heard) -> None:
    store = Store.open(stores_dir / "digits", verify=False)
    train(config, store, run_dir, ProcessGroup.single(), heard, stop_requested=heard.requested)


def test_a_run_whose_directory_is_lost_resumes_from_a_bucket(
    server: str, stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    overrides = parse_overrides(SETTINGS)
    mirrored = load_config("digits", {**overrides, "checkpoint.mirror": uri(server, "/runs")})
    run(load_config("digits", overrides), stores_dir, tmp_path / "clean" / "run", Heard())
    with pytest.raises(TrainingStopped) as stopped:
        run(mirrored, stores_dir, tmp_path / "first" / "run", Heard(stop=True))
    shutil.rmtree(tmp_path / "first")
    heard, second = Heard(), tmp_path / "second" / "run"
    run(mirrored, stores_dir, second, heard)
    assert [note for note in heard.notes if f"step-{stopped.value.step:08d} was fetched from s3://{BUCKET}" in note]
    assert_same_end(second, tmp_path / "clean" / "run")
    kept = [path.name for path in CheckpointFolder(second / "checkpoints").committed()]
    there = names(server, "/runs/run/checkpoints")
    assert [name.partition("/")[0] for name in there if name.endswith(MANIFEST)] == kept


def test_a_bucket_holds_what_the_folder_holds_and_no_half_of_a_checkpoint(server: str, tmp_path: Path) -> None:
    folder, mirror = CheckpointFolder(tmp_path / "run" / "checkpoints"), Mirror(uri(server, "/small"), "run")
    for step in (2, 4):
        folder.save(step, small_snapshot())
        mirror.keep(folder)
    folder.prune(1, set())
    mirror.keep(folder)
    there = names(server, "/small/run/checkpoints")
    assert {name.partition("/")[0] for name in there} == {"step-00000004"}
    assert f"step-00000004/{MANIFEST}" in there
    files, place = FileSystem.from_uri(uri(server, "/small/run/checkpoints"))
    files.delete_file(f"{place}/step-00000004/{MANIFEST}")
    assert mirror.restore(CheckpointFolder(tmp_path / "other" / "checkpoints")) == [], "a copy that was cut short"
    mirror.keep(folder)
    assert mirror.restore(CheckpointFolder(tmp_path / "other" / "checkpoints")) == ["step-00000004"]


def test_a_bucket_that_is_not_there_is_refused_before_a_step(server: str, stores_dir: Path, tmp_path: Path) -> None:
    config = load_config(
        "digits", {**parse_overrides(SETTINGS), "checkpoint.mirror": uri(server, "/runs", bucket="nobodys")}
    )
    with pytest.raises(UserError, match="Bucket 'nobodys' not found"):
        run(config, stores_dir, tmp_path / "run", Heard())
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").latest() is None
