"""What a run over hosts needs beside them: the tracking server, the run directory, the metrics port."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.cluster_runs import EPOCH, Training, assert_equal, standing_still
from support.hosts import CANARIES, METRICS, TOOLS, Cluster, Host, patience

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]

MLFLOW = 5000
AWAY_S, READ_ONLY_S = 60, 20


class TrackingServer:
    """MLflow with login on the head."""

    def __init__(self, head: Host, folder: Path) -> None:
        self._head, self._folder = head, folder
        self.uri = f"http://{head.address}:{MLFLOW}"
        self.database = f"sqlite:///{folder}/server.db"
        self._process: subprocess.Popen[str] | None = None
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = "
            f"{CANARIES['MLFLOW_TRACKING_USERNAME']}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        words = [str(TOOLS / "mlflow"), "server", "--host", "0.0.0.0", "--port", str(MLFLOW), "--workers", "1"]
        words += ["--app-name", "basic-auth", "--allowed-hosts", f"{self._head.address}:{MLFLOW}"]
        words += ["--backend-store-uri", self.database, "--artifacts-destination", f"{self._folder}/artifacts"]
        with (self._folder / "log.txt").open("a") as log:
            self._process = self._head.start(
                words,
                log,
                MLFLOW_AUTH_CONFIG_PATH=str(self._folder / "auth.ini"),
                MLFLOW_AUTH_ADMIN_PASSWORD=CANARIES["MLFLOW_TRACKING_PASSWORD"],
                MLFLOW_FLASK_SERVER_SECRET_KEY="c4n4ry-of-a-server",
                MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            )
        began = time.monotonic()
        while self.status("/health") != 200:
            assert time.monotonic() - began < patience(60), (self._folder / "log.txt").read_text()
            time.sleep(0.2)

    def status(self, path: str) -> int:
        """HTTP status without a login; 0 if nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.uri}{path}", timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def stop(self) -> None:
        """Kills it and its workers."""
        if self._process is not None:
            for pid in self._head.find("mlflow.server") + self._head.find("mlflow server"):
                subprocess.run(["kill", "-9", str(pid)], check=False)
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.mark.slow  # a minute without the server
def test_a_run_outlives_a_minute_without_the_tracking_server_and_delivers_every_step(
    hosts: Cluster, clean: Training, stores_dir: Path, tmp_path: Path
) -> None:
    server = TrackingServer(hosts.head, tmp_path)
    run = Training(hosts, tmp_path, stores_dir, MLFLOW_TRACKING_URI=server.uri)
    run.database = server.database
    try:
        server.start()
        assert server.status("/api/2.0/mlflow/experiments/search?max_results=1") == 401, "without a login"
        run.start()
        run.wait_for_step(EPOCH + 2)
        server.stop()
        assert server.status("/health") == 0
        run.wait_for_step(EPOCH + 8)  # trains on without it
        with standing_still(hosts.workers[0]):
            time.sleep(AWAY_S)
        server.start()
        said = run.finish()
    finally:
        run.end()
        server.stop()
    assert "Traceback" not in said
    assert run.record()["restarts"] == 0
    assert_equal(run, clean)


@contextmanager
def read_only(folder: Path, pids: list[int]) -> Iterator[None]:
    """Makes a folder read-only for processes and those that they have started, where they see mounts of their own."""
    enter = [["nsenter", "-t", str(pid), "-m", "mount"] for pid in pids]
    for words in enter:
        subprocess.run([*words, "--bind", str(folder), str(folder)], check=True)
        subprocess.run([*words, "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        for words in enter:
            subprocess.run([*words[:-1], "umount", "-l", str(folder)], check=True)


@pytest.mark.slow  # 20 seconds, and maybe a second training
def test_a_run_directory_that_is_read_only_for_a_while_is_one_sentence_and_costs_no_bit(
    hosts: Cluster, clean: Training, stores_dir: Path, tmp_path: Path
) -> None:
    run = Training(hosts, tmp_path, stores_dir)
    run.start()
    try:
        run.wait_for_step(EPOCH + 1)
        assert run.process is not None
        raylets = [pid for host in hosts.workers for pid in host.find("raylet/raylet")]
        with read_only(run.run_dir, [*raylets, run.process.pid]):
            with pytest.raises(OSError, match="Read-only"):
                Path(f"/proc/{raylets[0]}/root{run.run_dir}/probe").write_text("")
            time.sleep(READ_ONLY_S)
        while run.process.poll() is None:
            time.sleep(0.1)
        said = run.said
        assert "Traceback" not in said, said
        if run.process.returncode:
            assert run.process.returncode == 1
            (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert "read-only" in sentence.lower(), sentence
            run.start()
            run.finish()
    finally:
        run.end()
    assert_equal(run, clean)


def metrics_of(host: Host) -> dict[str, float]:
    """The gauges of spikefleet that Prometheus would read from the metrics port of a host, by name."""
    with urllib.request.urlopen(f"http://{host.address}:{METRICS}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("ray_spikefleet_") and 'run="run"' in line]
    return {line.partition("{")[0].removeprefix("ray_spikefleet_"): float(line.rpartition(" ")[2]) for line in ours}


@pytest.mark.slow  # a training over hosts
def test_a_raylet_that_is_killed_takes_its_workers_along_and_prometheus_sees_the_run_wait(
    hosts: Cluster, clean: Training, stores_dir: Path, tmp_path: Path
) -> None:
    run = Training(hosts, tmp_path, stores_dir)
    run.start()
    host = hosts.workers[1]
    try:
        run.wait_for_step(EPOCH + 2)
        with standing_still(hosts.workers[0]):
            run.wait_until(lambda: metrics_of(hosts.head).get("step", 0) > EPOCH, "the step is scraped", seconds=30)
            seen = metrics_of(hosts.head)
            assert (seen["epoch"], seen["waiting_seconds"]) == (1, 0)
            assert seen["images_per_second"] > 0
            assert 0 < seen["firing_rate"] < 1
            (raylet,) = host.find("raylet/raylet")
            subprocess.run(["kill", "-9", str(raylet)], check=True)
            run.wait_until(lambda: not host.find("RayTrainWorker"), "its worker has died with it", seconds=30)
        run.wait_until(lambda: f"host {host.address} is gone; the run waits" in run.said, "it waits", seconds=60)
        run.wait_until(lambda: metrics_of(hosts.head).get("waiting_seconds", 0) > 1, "that is scraped too", seconds=30)
        hosts.mend()
        run.finish()
    finally:
        run.end()
    assert run.record()["restarts"] == 1
    assert_equal(run, clean)
