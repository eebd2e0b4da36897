"""Commands that are submitted over HTTP to the head, followed, looked at and stopped; who is let in."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spikefleet.training.checkpoints import CheckpointFolder
from support.cluster_runs import SETTINGS
from support.hosts import CANARIES, TOOLS, Cluster, patience

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]

SECRET = CANARIES["MLFLOW_TRACKING_PASSWORD"]
PROGRAM = str(TOOLS / "spikefleet")


def spikefleet(cluster: Cluster, *words: str, code: int | None = 0, **environment: str | None) -> str:
    """A command on the second host: the client is no part of the head."""
    return cluster.workers[0].call([PROGRAM, *words], code, **environment)


def request(cluster: Cluster, method: str, path: str, token: str | None) -> tuple[int, bytes]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    asked = urllib.request.Request(f"{cluster.dashboard}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def jobs(cluster: Cluster) -> list[dict[str, Any]]:
    return list(json.loads(request(cluster, "GET", "/api/jobs/", cluster.token_file.read_text())[1]))


def training(folder: Path, stores_dir: Path, *more: str) -> Sequence[str]:
    return (
        *("train", "digits", *SETTINGS, *more, "--workers", "2", "--name", "submitted"),
        *("--runs-dir", str(folder), "--stores-dir", str(stores_dir)),
    )


@pytest.mark.slow  # twelve commands that import Ray, and a training
def test_a_submission_is_followed_found_again_shown_and_stopped_with_a_checkpoint(
    hosts: Cluster, stores_dir: Path, tmp_path: Path
) -> None:
    client, head = hosts.workers[0], ("--address", hosts.dashboard)
    words = ["submit", *training(tmp_path, stores_dir, "train.epochs=2000"), *head]
    tracking = {"MLFLOW_TRACKING_PASSWORD": SECRET, "POSTGRES_PASSWORD": SECRET}
    first = client.answer([PROGRAM, *words, "--no-wait", "--json"], **tracking)
    assert (first["job"], first["kind"], first["run"], first["new"]) == ("train-submitted", "train", "submitted", True)
    again = client.answer([PROGRAM, *words, "--no-wait", "--json"])
    assert (again["job"], again["new"]) == ("train-submitted", False), "it follows the one that runs"
    other = [word if not word.startswith("model.width=") else "model.width=0.25" for word in words]
    assert "with another configuration" in spikefleet(hosts, *other, code=2)

    began = time.monotonic()
    while "epoch " not in (said := spikefleet(hosts, "logs", "submitted", *head)):
        assert time.monotonic() - began < patience(100), said
    state = client.answer([PROGRAM, "status", "submitted", "--json", "--runs-dir", str(tmp_path)])
    assert (state["state"], state["epochs"]) == ("running", 2000)
    assert state["step"] > 0
    there = spikefleet(hosts, "status", *head)
    assert "train-submitted" in there
    assert "running" in there

    assert "job train-submitted has ended: stopped (exit code 143)" in spikefleet(hosts, "stop", "submitted", *head)
    assert CheckpointFolder(tmp_path / "submitted" / "checkpoints").latest() is not None
    assert json.loads((tmp_path / "submitted" / "run.json").read_text())["signal"] == "SIGTERM"
    assert "has already ended: stopped" in spikefleet(hosts, "stop", "submitted", *head)

    shown = json.dumps(jobs(hosts))
    assert "train-submitted" in shown
    for secret in (SECRET, hosts.token_file.read_text()):
        assert secret not in shown
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.slow  # imports torch in two processes, one after the other
def test_a_submission_ends_with_the_sentence_and_the_exit_code_of_its_job(
    hosts: Cluster, stores_dir: Path, tmp_path: Path
) -> None:
    """The same submission again gets another id, since this one has ended; code that is sent is there."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.yaml").write_text("base: digits\nrecipe: mine\n")
    words = list(training(tmp_path, stores_dir, "data.store=/no/such/store"))
    words[words.index("digits")] = str(tmp_path / "code" / "mine.yaml")
    seen = []
    for _ in range(2):
        refused = spikefleet(
            hosts, "submit", *words, "--with-code", str(tmp_path / "code"), "--address", hosts.dashboard, code=2
        )
        job = next(line.split()[1] for line in refused.splitlines() if line.startswith("job "))
        assert "/no/such/store" in refused, refused
        assert "failed (exit code 2)" in refused
        assert [one["status"] for one in jobs(hosts) if one["submission_id"] == job] == ["FAILED"]
        seen.append(job)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("token", "code"), [(None, 401), ("0" * 64, 403), ("the cluster's", 200)])
def test_the_jobs_api_lets_in_who_has_the_token(hosts: Cluster, token: str | None, code: int) -> None:
    given = hosts.token_file.read_text() if token == "the cluster's" else token
    for path in ("/api/jobs/", "/api/v0/nodes"):
        assert request(hosts, "GET", path, given)[0] == code, path
    for method, path in (("POST", "/api/jobs/"), ("DELETE", "/api/jobs/none")):
        found, _ = request(hosts, method, path, given)
        assert found == code or (code == 200 and found not in (401, 403)), (method, path, found)
    for path in ("/", "/api/gcs_healthz"):
        assert request(hosts, "GET", path, given)[0] == 200, "what needs no token"


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ("status", {"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "0" * 64}),
        ("train", {"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "0" * 64}),
        ("train", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": None}),
        ("train", {"RAY_AUTH_TOKEN_PATH": None, "HOME": "/nowhere"}),
        ("status", {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}),
    ],
    ids=["wrong, job", "wrong", "disabled", "missing", "no file"],
)
def test_a_token_that_is_refused_is_one_sentence(
    hosts: Cluster, stores_dir: Path, tmp_path: Path, words: str, environment: dict[str, str | None]
) -> None:
    command = ["status", "--address", hosts.dashboard]
    if words == "train":
        command = [*training(tmp_path, stores_dir), "--address", hosts.address]
    said = spikefleet(hosts, *command, code=2, **environment)
    errors = [line for line in said.splitlines() if "s so far" not in line and not line.startswith("data: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: ")
    assert "RAY_AUTH_TOKEN" in errors[0]
    assert not (tmp_path / "submitted").exists(), "nothing was written"
