"""A cluster of several hosts on one machine: network namespaces with an address, a name and a Ray of their own.

It needs root and iproute2. Every host sees the same files but `/tmp/ray`, `/dev/shm` and what names hosts in `/etc`, as
if storage were shared.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TOOLS = Path(sys.executable).parent
PORT = 6379
METRICS = 8080
DASHBOARD = 8265
CANARIES = {
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "c4n4ry-of-a-tracking-password",
    "AWS_SECRET_ACCESS_KEY": "c4n4ry-of-a-bucket",
    "POSTGRES_PASSWORD": "c4n4ry-of-a-database",
}
"""Secrets in the environment of all hosts, which must be found nowhere else."""
_OBJECT_STORE_BYTES = 100_000_000
_START_S = 60.0
_LOOK_S = 0.1


def missing() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts in network namespaces need Linux and root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "hosts in network namespaces need `ip` (iproute2) and `unshare` (util-linux)"
    bridge, name = f"sf{os.getpid()}p", f"sfprobe{os.getpid()}"
    link = ["ip", "link", "add", f"v{bridge}", "type", "veth", "peer", "name", "eth0", "netns", name]
    mounted = ["unshare", "-m", "-u", "sh", "-c", f"hostname {name} && mount -t tmpfs tmpfs /dev/shm"]
    steps = (
        ("network namespaces", ["ip", "netns", "add", name]),
        ("bridges", ["ip", "link", "add", bridge, "type", "bridge"]),
        ("links into namespaces", link),
        ("mounts in namespaces", ["ip", "netns", "exec", name, *mounted]),
    )
    try:
        for what, words in steps:
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                return f"{what} cannot be made here: {(done.stderr or done.stdout).strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)
    return None


def patience(seconds: float) -> float:
    """Seconds to wait for what takes so many at most on a quiet machine: more where processes compete for its cores.

    How many more is seen by how long some computing takes here and now, and by the load.
    """
    global _slowness, _measured_at
    if time.monotonic() - _measured_at > _MEASURE_EVERY_S:
        began, used = time.monotonic(), time.process_time()
        while time.process_time() - used < _COMPUTING_S:
            pass
        _measured_at = time.monotonic()
        slowness = (_measured_at - began) / _COMPUTING_S
        _slowness = min(40.0, max(1.0, slowness, os.getloadavg()[0] / (os.cpu_count() or 1), 0.8 * _slowness))
    return seconds * _slowness


_MEASURE_EVERY_S, _COMPUTING_S = 10.0, 0.02
_measured_at, _slowness = -_MEASURE_EVERY_S, 1.0


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Host:
    """One host: a network namespace behind a bridge.

    Args:
        name: of the namespace, and its host name.
        address: of its interface eth0.
        folder: what it keeps to itself.
        environment: of all its processes.
    """

    def __init__(self, name: str, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.environment = dict(environment)
        self._link = f"v{name}"

    def connect(self, bridge: str, gateway: str, addresses: Mapping[str, str]) -> None:
        """Makes the namespace and its link.

        Args:
            bridge: that the link leads to.
            gateway: its address.
            addresses: of all hosts by name. No name server is asked: Ray and torch wait for one that does not answer,
                10 to 20 s for every group of workers.
        """
        _ip("netns", "add", self.name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._link, "master", bridge)
        _ip("link", "set", self._link, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", self.name, "link", "set", device, "up")
        _ip("-n", self.name, "route", "add", "default", "via", gateway)  # else Ray takes 127.0.0.1 for its address
        (self.folder / "shm").mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(self.folder / "shm")], check=True)

    def cut(self, *, up: bool = False) -> None:
        """Cuts its link, or mends it."""
        _ip("link", "set", self._link, "up" if up else "down")

    def start(
        self,
        words: Sequence[str],
        output: IO[str] | int | None = None,
        errors: int = subprocess.STDOUT,
        **environment: str | None,
    ) -> subprocess.Popen[str]:
        """Starts a program on this host; its process id is that of the program.

        Args:
            words: the program and its arguments.
            output: of both streams.
            errors: of the second one, if it goes elsewhere.
            environment: variables to set; None unsets one.
        """
        (self.folder / "ray").mkdir(exist_ok=True)
        settings = {**self.environment, **environment}
        own = {"shm": "/dev/shm", "ray": "/tmp/ray", "hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf"}
        mounts = [
            f"if [ -e {there} ]; then mount --bind {self.folder / name} {there}; fi" for name, there in own.items()
        ]
        script = " && ".join([f"hostname {self.name}", "mkdir -p /tmp/ray", *mounts, 'exec "$@"'])
        prefix = ["ip", "netns", "exec", self.name, "unshare", "-m", "-u", "sh", "-c", script, "sh"]
        return subprocess.Popen(
            [*prefix, *words],
            env={key: value for key, value in settings.items() if value is not None},
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

    def call(
        self, words: Sequence[str], code: int | None = 0, seconds: float = 100.0, **environment: str | None
    ) -> str:
        """Runs a program to its end, and returns what it printed on both streams."""
        process = self.start(words, subprocess.PIPE, subprocess.STDOUT, **environment)
        try:
            said, _ = process.communicate(timeout=patience(seconds))
        finally:
            process.kill()
        assert code is None or process.returncode == code, f"{words}: exit code {process.returncode}\n{said}"
        return said

    def answer(self, words: Sequence[str], **environment: str | None) -> Any:
        """Runs a program that prints JSON on stdout, and returns it."""
        process = self.start(words, subprocess.PIPE, subprocess.PIPE, **environment)
        said, complaints = process.communicate(timeout=patience(100))
        assert process.returncode == 0, said + complaints
        return json.loads(said)

    def processes(self) -> list[int]:
        """Ids of everything that runs on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def find(self, part: str) -> list[int]:
        """Ids of its processes with this text in their command line."""
        found = []
        for pid in self.processes():
            path = Path(f"/proc/{pid}/cmdline")
            try:
                if part in path.read_bytes().decode(errors="replace").replace("\0", " "):
                    found.append(pid)
            except OSError:  # it has ended
                continue
        return found

    def die(self) -> int:
        """Kills all its processes, as when its power fails; returns how many there were."""
        killed = 0
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        return killed

    def remove(self) -> None:
        """Ends everything, and removes the namespace."""
        self.die()
        subprocess.run(["umount", str(self.folder / "shm")], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


class Cluster:
    """A Ray cluster with token authentication over hosts; the first one is the head, without CPUs.

    Args:
        folder: for its files.
        workers: hosts beside the head, with one CPU each.
    """

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder = folder
        self.token_file = folder / "token"
        self.token_file.write_text(secrets.token_hex(32))
        self.token_file.chmod(0o600)
        net = _free_network()
        _remove_orphans()
        tag = f"{os.getpid()}"
        self._bridge = f"sf{tag}b"
        self._gateway = f"{net}.254"
        environment = {
            **os.environ,
            "PATH": f"{TOOLS}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_raylet_start_wait_time_s": "900",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "900",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "5",
            "RAY_metrics_report_interval_ms": "1000",
            "COLUMNS": "200",
            **CANARIES,
        }
        environment = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
        names = [f"sf{tag}h{number}" for number in range(workers + 1)]
        self.hosts = [
            Host(name, f"{net}.{number + 1}", folder / name, environment) for number, name in enumerate(names)
        ]
        self.head, self.workers = self.hosts[0], self.hosts[1:]

    @property
    def address(self) -> str:
        """HOST:PORT of the cluster."""
        return f"{self.head.address}:{PORT}"

    @property
    def dashboard(self) -> str:
        """Address of its Jobs API."""
        return f"http://{self.head.address}:{DASHBOARD}"

    def start(self) -> None:
        """Makes the network, and starts Ray on all hosts."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self.hosts:
            host.connect(self._bridge, self._gateway, {other.name: other.address for other in self.hosts})
        ray = str(TOOLS / "ray")
        shared = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        words = [ray, "start", "--head", f"--node-ip-address={self.head.address}", f"--port={PORT}", "--num-cpus=0"]
        words += ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}", f"--metrics-export-port={METRICS}"]
        self.head.call([*words, *shared])
        joining = [self.join(host) for host in self.workers]
        for process in joining:
            said, _ = process.communicate(timeout=patience(_START_S))
            assert process.returncode == 0, said
        self.wait_for_hosts(len(self.hosts))

    def join(self, host: Host) -> subprocess.Popen[str]:
        """Starts Ray on a host that runs nothing of an earlier one."""
        host.die()
        shutil.rmtree(host.folder / "ray", ignore_errors=True)
        words = ["start", f"--address={self.address}", f"--node-ip-address={host.address}", "--num-cpus=1"]
        words += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        return host.start([str(TOOLS / "ray"), *words], subprocess.PIPE)

    def mend(self) -> None:
        """Brings back the hosts that have died, so that the next test has all of them."""
        gone = [host for host in self.workers if not host.find("raylet/raylet")]
        for host in self.hosts:
            host.cut(up=True)
        for process in [self.join(host) for host in gone]:
            said, _ = process.communicate(timeout=patience(_START_S))
            assert process.returncode == 0, said
        self.wait_for_hosts(len(self.hosts))

    def wait_for_hosts(self, count: int, seconds: float = _START_S) -> None:
        """Waits until Ray knows exactly so many living hosts."""
        began = time.monotonic()
        while (found := self.living()) != count:
            assert time.monotonic() - began < patience(seconds), f"{found} of {count} hosts are there"
            time.sleep(_LOOK_S * 5)

    def living(self) -> int:
        """Number of living hosts, by the dashboard; 0 if it does not answer."""
        return len(self._nodes())

    def node_id(self, host: Host) -> str:
        """Ray's id of a living host."""
        (found,) = [node["node_id"] for node in self._nodes() if node["node_ip"] == host.address]
        return str(found)

    def _nodes(self) -> list[dict[str, Any]]:
        import urllib.request

        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?limit=1000",
            headers={"Authorization": f"Bearer {self.token_file.read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except OSError:
            return []
        return [node for node in nodes if node["state"] == "ALIVE"]

    def stop(self) -> None:
        """Ends all hosts, and removes the network."""
        for host in reversed(self.hosts):
            host.remove()
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _remove_orphans() -> None:
    """Removes hosts whose tests were killed: the names hold the process."""
    for pid, host in re.findall(r"^sf(\d+)h(\d)", _ip("netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            Host(f"sf{pid}h{host}", "", Path(), {}).remove()
            subprocess.run(["ip", "link", "del", f"sf{pid}b"], capture_output=True)


def _free_network() -> str:
    taken = _ip("-o", "addr")
    for number in range(os.getpid() % 100, os.getpid() % 100 + 100):
        if f" 10.{100 + number}.0." not in taken:
            return f"10.{100 + number}.0"
    raise AssertionError("no network 10.x.0.0/24 is free")


@contextmanager
def running(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """A cluster of a head and other hosts while the block runs."""
    cluster = Cluster(folder, workers)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
