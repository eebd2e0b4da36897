"""Tracking at a real MLflow server that is away, hangs, is killed and comes back."""

import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from spikefleet.errors import UserError
from spikefleet.tracking.journal import DELIVERED
from spikefleet.tracking.mlflow_pages import KIND, MODEL_TRAINING, NOTE
from spikefleet.tracking.tracker import TrackedDataset, Tracker, sync
from support.mlflow_server import Server
from support.tracked import BLOCKED_S, history, log_losses, losses


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


def test_a_server_that_is_away_killed_and_restarted_gets_everything_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "runs" / "outage"
    caplog.set_level(logging.WARNING)

    # Away at the start: the run does not exist yet, the training goes on.
    tracker = Tracker.open(run_dir, "outage", "digits", server.uri.replace("//", "//ann:s3cret@"))
    tracker.log_params({"seed": 1})
    longest = log_losses(tracker, range(100))
    assert tracker.flush(wait_s=1.5) == 102
    assert tracker.run_id is None
    assert f"tracking at {server.uri} fails" in caplog.text

    server.start()
    assert tracker.flush(wait_s=20) == 0
    client = MlflowClient(tracking_uri=server.uri)
    assert history(client, tracker.run_id, "train/loss") == losses(100)
    assert tracker.run_url.endswith(f"/runs/{tracker.run_id}?workflowType=machine_learning")

    # It hangs, then it is killed while records stream; an artifact and tags meet the outage, too.
    server.send(signal.SIGSTOP)
    longest = max(longest, log_losses(tracker, range(100, 3000)))
    begin = time.perf_counter()
    assert tracker.flush(wait_s=0.8) > 0
    assert time.perf_counter() - begin < 0.8 + BLOCKED_S
    server.stop(signal.SIGKILL)
    begin = time.perf_counter()
    tracker.log_dict({"T": 4}, "config.json")
    tracker.set_tags({"state": "the server is away", "failure": "cable pulled"})
    tracker.set_tags({"failure": ""})
    tracker.log_dataset(TrackedDataset("digits", "f438ba1aaf09", "{}", "{}", "{}"))
    tracker.describe_experiment({KIND: MODEL_TRAINING})
    tracker.describe("Training.")
    longest = max(longest, time.perf_counter() - begin, log_losses(tracker, range(3000, 3500)))
    undelivered = tracker.finish("FINISHED", wait_s=1)
    assert undelivered > 500
    assert f"spikefleet tracking sync {run_dir}" in caplog.text
    with pytest.raises(UserError, match=rf"http://127.0.0.1\S* did not take {undelivered} records"):
        sync(run_dir)

    server.start()
    assert sync(run_dir) == undelivered
    run = client.get_run(tracker.run_id)
    assert history(client, tracker.run_id, "train/loss") == losses(3500)
    assert run.info.status == "FINISHED"
    assert run.data.tags["state"] == "the server is away"
    assert [artifact.path for artifact in client.list_artifacts(tracker.run_id)] == ["config.json"]
    assert len(client.search_runs([run.info.experiment_id])) == 1

    # Once more from the first record: the server keeps every row once.
    (run_dir / DELIVERED).unlink()
    assert sync(run_dir, server.uri) > 3500
    assert history(client, tracker.run_id, "train/loss") == losses(3500)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    run = client.get_run(tracker.run_id)
    assert [data.dataset.digest for data in run.inputs.dataset_inputs] == ["f438ba1aaf09"]
    assert (run.data.tags[NOTE], run.data.tags.get("failure")) == ("Training.", None)
    assert client.get_experiment(run.info.experiment_id).tags[KIND] == MODEL_TRAINING

    assert longest < BLOCKED_S
    assert "s3cret" not in caplog.text
    assert not any(b"s3cret" in file.read_bytes() for file in run_dir.rglob("*") if file.is_file())
    server.stop(signal.SIGTERM)
