"""Tracking against real MLflow in a SQLite file."""

import json
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from mlflow import MlflowClient
from mlflow.entities import Param
from rich.console import Console

from spikefleet.errors import UserError
from spikefleet.runs.observer import RunObserver
from spikefleet.runs.progress import PlainDisplay
from spikefleet.runs.run_dir import Run
from spikefleet.tracking.journal import DELIVERED
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker, sync
from spikefleet.training.events import CheckpointSaved, Recovered, Started, StepDone, WorkerFailed
from support.tracked import BLOCKED_S, history, log_losses, loss, losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uri(runs: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield resolve_tracking_uri(runs)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def test_a_run_reaches_mlflow_whole(runs: Path, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = Tracker.open(runs / "whole", "whole", "digits", uri)
    plot = tmp_path / "curve.png"
    plot.write_bytes(b"first")
    tracker.log_params({f"p{n}": n for n in range(230)} | {"model.long": "z" * 7000})
    tracker.set_tags({"task": "classification", "note": "é" * 9000})
    tracker.log_artifact(plot, "plots")
    plot.write_bytes(b"changed after it was logged")
    tracker.log_dict({"T": 4, "gate": "bsg"}, "config.json")
    tracker.log_table([{"layer": "stem", "rate": 0.25}, {"layer": "head", "rate": 0.5}], "health/layers.parquet")
    log_losses(tracker, range(2300))
    tracker.log_metrics({"nan": float("nan"), "many/0": 1.0} | {f"many/{n}": n for n in range(1, 1200)}, 0)
    assert tracker.finish("FINISHED", wait_s=30) == 0

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "whole"
    assert {key: run.data.params[key] for key in ("p0", "p229")} == {"p0": "0", "p229": "229"}
    assert len(run.data.params) == 231
    assert len(run.data.params["model.long"]) == 6000
    assert run.data.params["model.long"].endswith("... (whole: params/model.long.txt)")
    assert len(run.data.tags["note"]) == 8000
    assert history(client, tracker.run_id, "train/loss") == losses(2300)
    assert len(run.data.metrics) == 1202

    def artifact(path: str) -> Path:
        return Path(client.download_artifacts(tracker.run_id, path, str(tmp_path)))

    assert artifact("plots/curve.png").read_bytes() == b"first"
    assert artifact("params/model.long.txt").read_text() == "z" * 7000
    assert artifact("tags/note.txt").read_text() == "é" * 9000
    assert json.loads(artifact("config.json").read_text()) == {"T": 4, "gate": "bsg"}
    table = pyarrow.parquet.read_table(artifact("health/layers.parquet"))
    assert table.to_pylist()[1] == {"layer": "head", "rate": 0.5}
    assert run.info.artifact_uri.startswith((runs / "artifacts").as_uri())


def test_a_run_that_is_opened_again_goes_on_and_repeats_no_step(runs: Path, uri: str, client: MlflowClient) -> None:
    first = Tracker.open(runs / "again", "again", "digits", uri)
    first.log_params({"lr": 0.1, "seed": 1, "long": "y" * 7000})
    log_losses(first, range(50))
    assert first.finish("FAILED", wait_s=30) == 0
    assert client.get_run(first.run_id).info.status == "FAILED"

    second = Tracker.open(runs / "again", "another name", "another experiment", uri)
    second.log_params({"lr": 0.2, "seed": 2, "long": "y" * 7000, "new": "x"})
    second.log_params({"lr": 0.1})
    log_losses(second, range(30, 80))
    assert second.flush(wait_s=30) == 0
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert second.finish("FINISHED", wait_s=30) == 0

    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert {key: run.data.params[key] for key in ("lr", "seed", "new")} == {"lr": "0.1", "seed": "1", "new": "x"}
    assert {key: value for key, value in run.data.tags.items() if key.startswith("changed.")} == {
        "changed.seed": "2",
        "changed.lr": "0.1",
    }
    assert history(client, first.run_id, "train/loss") == losses(80)


def test_restarts_and_what_an_earlier_driver_missed_are_tracked(
    runs: Path, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    run = Run(runs / "restarted")
    run.path.mkdir()
    run.note(status="running", restarts=0)
    tracker = Tracker.open(run.path, "restarted", "digits", uri)
    observer = RunObserver(run, tracker, PlainDisplay(Console(quiet=True)))
    missed = StepDone(0, 1, {"train/loss": loss(1)})
    for event in (
        Recovered((missed, CheckpointSaved(1, "step-00000001"))),
        Started(1, 9, 9, 1, {"threads": [2, 1], "parameters": 7}),
        StepDone(0, 2, {"train/loss": loss(2)}),
        WorkerFailed("rank 1: killed"),
        Started(2, 9, 9, 1),
        StepDone(0, 3, {"train/loss": loss(3)}),
    ):
        observer.emit(event)
    assert tracker.finish("FINISHED", wait_s=30) == 0
    found = client.get_run(tracker.run_id).data
    assert (found.tags["restarts"], found.params["parameters"]) == ("1", "7")
    environment = Path(client.download_artifacts(tracker.run_id, "environment.json", str(tmp_path)))
    assert json.loads(environment.read_text()) == {"threads": [2, 1], "parameters": 7}
    assert run.record()["restarts"] == 1
    assert run.record()["threads"] == [2, 1]
    assert history(client, tracker.run_id, "train/loss") == losses(4)[1:]


PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from spikefleet.tracking.tracker import Tracker
    tracker = Tracker.open(Path(sys.argv[1]), "killed", "digits", sys.argv[2])
    delivered = sys.argv[3] == "delivered"
    for step in range(60):
        tracker.log_metrics({"train/loss": 2.0 / (step + 3)}, step)
        if delivered and step == 30:
            tracker.flush(30)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["at once", "delivered"])
def test_a_process_killed_with_sigkill_leaves_nothing_out_and_nothing_twice(
    runs: Path, uri: str, client: MlflowClient, when: str
) -> None:
    directory = runs / f"killed {when}"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM), directory, uri, when], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (json.loads((directory / DELIVERED).read_text())["records"] > 30) == (when == "delivered")

    tracker = Tracker.open(directory, "killed", "digits", uri)  # resumes at the checkpoint of step 40
    log_losses(tracker, range(40, 100))
    assert tracker.finish("FINISHED", wait_s=30) == 0
    assert history(client, tracker.run_id, "train/loss") == losses(100)


def test_a_crash_after_any_request_repeats_nothing(runs: Path, uri: str, client: MlflowClient) -> None:
    """MLflow carries out every other request but its answer is lost, as when the sender dies before it acknowledges."""
    requests: Counter[str] = Counter()

    def carry_out_and_lose_the_answer(name: str) -> Callable[..., Any]:
        real = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = real(*args, **kwargs)
            requests[name] += 1
            if requests[name] % 2:
                raise ConnectionError(f"the answer to {name} is lost")
            return answer

        return call

    directory = runs / "lost answers"
    tracker = Tracker.open(directory, "lost answers", "lost answers", uri)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_experiment", "create_run", "log_batch", "log_artifact", "set_terminated"):
            requests[name] = 0
            patch.setattr(MlflowClient, name, carry_out_and_lose_the_answer(name))
        tracker.log_params({"seed": 1})
        log_losses(tracker, range(20))
        tracker.log_dict({"a": 1}, "a.json")
        log_losses(tracker, range(20, 40))
        assert tracker.finish("FINISHED", wait_s=30) == 0

    assert min(requests.values()) > 0  # each kind has lost an answer
    experiment = client.get_experiment_by_name("lost answers")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert history(client, run.info.run_id, "train/loss") == losses(40)


def test_the_whole_journal_can_be_sent_again(runs: Path, uri: str, client: MlflowClient) -> None:
    tracker = Tracker.open(runs / "twice", "twice", "digits", uri)
    tracker.set_tags({"state": "first"})
    log_losses(tracker, range(100))
    tracker.set_tags({"state": "last"})
    assert tracker.finish("FINISHED", wait_s=30) == 0
    (runs / "twice" / DELIVERED).unlink()

    assert sync(runs / "twice", uri) == 104
    assert history(client, tracker.run_id, "train/loss") == losses(100)
    assert client.get_run(tracker.run_id).data.tags["state"] == "last"
    assert sync(runs / "twice") == 0  # the directory knows its server


def test_another_server_gets_the_whole_run(runs: Path, uri: str, tmp_path: Path) -> None:
    tracker = Tracker.open(runs / "moved", "moved", "digits", uri)
    log_losses(tracker, range(10))
    tracker.log_dict({"a": 1}, "a.json")
    assert tracker.finish("FINISHED", wait_s=30) == 0

    elsewhere = f"sqlite:///{tmp_path}/mlflow.db"
    moved = Tracker.open(runs / "moved", "moved", "digits", elsewhere)
    log_losses(moved, range(10, 20))
    assert moved.finish("FINISHED", wait_s=30) == 0
    client = MlflowClient(tracking_uri=elsewhere)
    assert history(client, moved.run_id, "train/loss") == losses(20)
    assert [artifact.path for artifact in client.list_artifacts(moved.run_id)] == ["a.json"]


def test_a_record_that_mlflow_refuses_does_not_hold_up_the_others(
    runs: Path, uri: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(runs / "refused", "refused", "digits", uri)
    assert tracker.flush(wait_s=30) == 0
    client.log_batch(tracker.run_id, params=[Param("seed", "somebody else's")])

    log_losses(tracker, range(10))
    tracker.log_params({"seed": 1})
    log_losses(tracker, range(10, 20))
    tracker.log_dict({"a": 1}, "gone.json")
    (spooled,) = (runs / "refused").rglob("gone.json")
    spooled.unlink()
    tracker.log_dict({"b": 2}, "kept.json")
    assert tracker.finish("FINISHED", wait_s=30) == 0

    assert caplog.text.count("MLflow rejected a record") == 2
    assert history(client, tracker.run_id, "train/loss") == losses(20)
    assert [artifact.path for artifact in client.list_artifacts(tracker.run_id)] == ["kept.json"]


def test_a_run_that_was_deleted_in_mlflow_stops_the_tracking_not_the_training(
    runs: Path, uri: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(runs / "deleted", "deleted", "digits", uri)
    tracker.flush(wait_s=30)
    client.delete_run(tracker.run_id)
    log_losses(tracker, range(10))
    begin = time.perf_counter()
    assert tracker.finish("FINISHED", wait_s=30) == 11
    assert time.perf_counter() - begin < 10
    assert f"mlflow runs restore --run-id {tracker.run_id}" in caplog.text

    client.restore_run(tracker.run_id)
    assert sync(runs / "deleted") == 11
    assert history(client, tracker.run_id, "train/loss") == losses(10)


def test_a_child_run_hangs_below_its_parent(runs: Path, uri: str, client: MlflowClient) -> None:
    parent = Tracker.open(runs / "search", "search", "digits", uri)
    assert parent.finish("FINISHED", wait_s=30) == 0
    child = Tracker.open(runs / "trial", "trial", "digits", uri, parent_run_id=parent.run_id)
    assert child.finish("KILLED", wait_s=30) == 0
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.info.status == "KILLED"
    assert child.run_url.startswith("mlflow ui --backend-store-uri sqlite:///")


def test_two_writers_on_one_database_lose_nothing(runs: Path, uri: str, client: MlflowClient) -> None:
    trackers = [Tracker.open(runs / f"side{n}", f"side{n}", "digits", uri) for n in range(2)]
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("BEGIN IMMEDIATE")  # somebody holds the write lock for a while
        longest = max(log_losses(tracker, range(200)) for tracker in trackers)
        time.sleep(1)
        database.rollback()
    assert longest < BLOCKED_S
    for tracker in trackers:
        assert tracker.finish("FINISHED", wait_s=40) == 0
        assert history(client, tracker.run_id, "train/loss") == losses(200)


@pytest.mark.parametrize("key", ["", "a//b", "/a", "../a", "a\nb", "loss%", "x" * 251, "."])
def test_keys_that_mlflow_would_refuse_are_refused_at_once(runs: Path, uri: str, key: str) -> None:
    tracker = Tracker.open(runs / "keys", "keys", "digits", uri)
    for call in (tracker.log_params, tracker.set_tags):
        with pytest.raises(UserError, match="tracking key"):
            call({key: "1"})
    with pytest.raises(UserError, match="tracking key"):
        tracker.log_metrics({key: 1.0}, 0)
    tracker.finish("FINISHED", wait_s=0)


@pytest.mark.parametrize(
    "name", ["../a.json", "/a.json", "a/../../b.json", "a\\b.json", "a\0.json", "a%2e.json", "#", ""]
)
def test_artifact_names_that_leave_the_run_are_refused(runs: Path, uri: str, name: str) -> None:
    tracker = Tracker.open(runs / "names", "names", "digits", uri)
    with pytest.raises(UserError, match="artifact"):
        tracker.log_dict({}, name)
    with pytest.raises(UserError, match="does not exist"):
        tracker.log_artifact(runs / "missing.png")
    with pytest.raises(UserError, match="at least one row"):
        tracker.log_table([], "rows.parquet")
    tracker.finish("FINISHED", wait_s=0)


def test_a_tracking_uri_that_mlflow_does_not_serve_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI.*mlruns.*http"):
        resolve_tracking_uri(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " http://127.0.0.1:5000 ")
    assert resolve_tracking_uri(tmp_path) == "http://127.0.0.1:5000"
    with pytest.raises(UserError, match=r"has no tracking\.jsonl"):
        sync(tmp_path)
