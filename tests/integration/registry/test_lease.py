"""The lease: one holder at a time, also when holders are killed, suspended, or race for the lease of a dead one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from spikefleet.registry import lease as leases
from spikefleet.registry.lease import LeaseHeldError, LeaseLostError, holder_of, lease, lease_key
from support.registered import Trained


@pytest.fixture
def client(first: Trained) -> MlflowClient:
    return MlflowClient(first.uri, registry_uri=first.uri)


def plant(client: MlflowClient, name: str, **changes: object) -> None:
    """The lease of a holder of another host."""
    now = time.time()
    record = {
        "id": "a" * 32,
        "label": "retraining of before",
        "host": "elsewhere",
        "process": 7,
        "place": "",
        "since": now - 3600,
        "expires": now + 60,
        **changes,
    }
    client.create_registered_model(lease_key(name, "promotion"), tags={"spikefleet.lease": json.dumps(record)})


def left(client: MlflowClient, name: str) -> list[str]:
    """The models that stand for leases and claims of a name."""
    return sorted(one.name for one in client.search_registered_models() if name in one.name)


def test_the_second_waits_and_purposes_exclude_only_their_own(client: MlflowClient) -> None:
    with lease(client, "m1", "promotion", "job one") as held:
        held.check()
        assert (holder_of(client, "m1", "promotion") or "").startswith("job one (process ")
        with (
            pytest.raises(LeaseHeldError, match="model m1 is being promoted by job one"),
            lease(client, "m1", "promotion", "job two", patience_s=0),
        ):
            pass
        with lease(client, "m1", "retraining", "job three", patience_s=0):
            pass
    with lease(client, "m1", "promotion", "job two", patience_s=0):
        pass
    assert left(client, "m1") == []


class Holders:
    """Counts the jobs that hold a lease."""

    def __init__(self) -> None:
        self.inside, self.most, self.held = 0, 0, 0
        self._guard = threading.Lock()

    def visit(self, client: MlflowClient, name: str, number: int) -> None:
        """Holds the lease for a moment."""
        with lease(client, name, "promotion", f"job {number}") as mine:
            mine.check()
            with self._guard:
                self.inside, self.held = self.inside + 1, self.held + 1
                self.most = max(self.most, self.inside)
            time.sleep(0.02)
            with self._guard:
                self.inside -= 1


def test_many_jobs_take_turns(client: MlflowClient) -> None:
    holders = Holders()
    with ThreadPoolExecutor(6) as jobs:
        list(jobs.map(lambda number: holders.visit(client, "m2", number), range(12)))
    assert (holders.most, holders.held) == (1, 12)
    assert left(client, "m2") == []


@pytest.mark.parametrize(("late_s", "free"), [(-30.0, False), (500.0, False), (700.0, True)])
def test_a_lease_of_another_host_is_taken_over_ten_minutes_after_its_end(
    client: MlflowClient, late_s: float, free: bool
) -> None:
    name = f"m3{free}{late_s}"
    plant(client, name, expires=time.time() - late_s)
    if not free:
        with (
            pytest.raises(LeaseHeldError, match="retraining of before"),
            lease(client, name, "promotion", "x", patience_s=0),
        ):
            pass
        return
    with lease(client, name, "promotion", "job two", patience_s=0):
        assert left(client, name) == [lease_key(name, "promotion")]
    assert left(client, name) == []


def test_of_many_that_take_over_the_lease_of_a_dead_holder_one_holds_it_at_a_time(client: MlflowClient) -> None:
    for attempt in range(3):
        name, holders = f"m4-{attempt}", Holders()
        plant(client, name, expires=time.time() - 700)
        with ThreadPoolExecutor(5) as jobs:
            list(jobs.map(lambda number: holders.visit(client, name, number), range(5)))  # noqa: B023 -- used at once
        assert (holders.most, holders.held) == (1, 5)
        assert left(client, name) == []


def test_a_slow_job_that_saw_the_dead_holder_does_not_take_the_lease_of_a_later_one(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the old record; before it makes its claim, others took the lease over, released it, took it anew."""
    plant(client, "m5", expires=time.time() - 700)
    real = leases._create
    come: list[str] = []
    later = lease(client, "m5", "promotion", "fast two", patience_s=0)

    def slow(of: MlflowClient, key: str, record: leases._Record) -> bool:
        if ".after-" in key and not come:
            come.append(key)
            with lease(client, "m5", "promotion", "fast one", patience_s=0):
                pass
            later.__enter__()
        return real(of, key, record)

    monkeypatch.setattr(leases, "_create", slow)
    with pytest.raises(LeaseHeldError, match="fast two"), lease(client, "m5", "promotion", "slow", patience_s=0):
        pass
    assert left(client, "m5") == [lease_key("m5", "promotion")]
    later.__exit__(None, None, None)
    assert left(client, "m5") == []


def test_a_claim_whose_maker_died_does_not_block(client: MlflowClient) -> None:
    plant(client, "m6", expires=time.time() - 700)
    dead = {"id": "b", "label": "l", "host": "h", "process": 1, "place": "", "since": 0.0, "expires": 0.0}
    claim = f"{lease_key('m6', 'promotion')}.after-{'a' * 32}.1"
    client.create_registered_model(claim, tags={"spikefleet.lease": json.dumps(dead)})
    with lease(client, "m6", "promotion", "job", patience_s=0):
        pass
    assert left(client, "m6") == []


@pytest.fixture
def ended() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_holder_of_this_host_that_was_killed_is_noticed_at_once(
    client: MlflowClient, ended: subprocess.Popen[bytes]
) -> None:
    start = leases._start_of(ended.pid)
    boot, namespace, _ = leases._parts(leases._place())
    now = time.time()
    here = socket.gethostname()
    record = leases._Record("c", "killed one", here, ended.pid, f"{boot} {namespace} {start}", now, now + 100)
    plant(client, "m7", **asdict(record))
    with pytest.raises(LeaseHeldError, match="killed one"), lease(client, "m7", "promotion", "x", patience_s=0):
        pass
    assert replace(record, place=f"{boot} {namespace} 1").is_free  # another process with its number
    assert not replace(record, host="elsewhere", place=f"{boot} {namespace} 1").is_free
    ended.kill()
    ended.wait()
    with lease(client, "m7", "promotion", "x", patience_s=0):
        pass


def test_a_lease_is_renewed_and_one_that_was_taken_over_is_lost(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_EVERY_S", 0.05)
    key = lease_key("m8", "promotion")

    def expiry() -> float:
        found = leases._read(client, key)
        assert found is not None
        return found.expires

    with lease(client, "m8", "promotion", "sleeper") as held:
        before = expiry()
        deadline = time.monotonic() + 20
        while expiry() <= before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert expiry() > before
        client.delete_registered_model(key)
        plant(client, "m8", label="another job")
        with pytest.raises(LeaseLostError, match=r"was lost: .* another job"):
            held.check()
    assert left(client, "m8") == [key]  # that of the other job stays


def test_a_model_of_that_name_without_a_holder_is_named(client: MlflowClient, tmp_path: Path) -> None:
    client.create_registered_model(lease_key("m9", "promotion"))
    with (
        pytest.raises(LeaseHeldError, match=r"by another job.*spikefleet-lease\.promotion\.m9 stands for it"),
        lease(client, "m9", "promotion", "x", patience_s=0),
    ):
        pass


def test_a_lease_that_its_holder_renews_just_then_is_not_taken_over(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder was suspended, and wakes up between the look at its record and the claim."""
    plant(client, "m10", expires=time.time() - 700)
    real = leases._create

    def awake(of: MlflowClient, key: str, record: leases._Record) -> bool:
        if ".after-" in key:
            tag = f"{leases._RENEWED}{'a' * 32}"
            client.set_registered_model_tag(lease_key("m10", "promotion"), tag, str(time.time() + 100))
        return real(of, key, record)

    monkeypatch.setattr(leases, "_create", awake)
    with (
        pytest.raises(LeaseHeldError, match="retraining of before"),
        lease(client, "m10", "promotion", "x", patience_s=0),
    ):
        pass
    assert left(client, "m10") == [lease_key("m10", "promotion")]


def test_a_holder_that_was_suspended_renews_before_it_changes_anything(client: MlflowClient) -> None:
    key = lease_key("m11", "promotion")
    with lease(client, "m11", "promotion", "sleeper") as held:
        client.set_registered_model_tag(key, f"{leases._RENEWED}{held.id}", str(time.time() - 700))
        found = leases._read(client, key)
        assert found is not None
        assert replace(found, host="elsewhere").is_free
        held.check()
        found = leases._read(client, key)
        assert found is not None
        assert found.expires > time.time()


def test_a_lease_that_is_released_between_two_looks_is_free(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(client, "m12")

    def released(of: MlflowClient, key: str) -> None:
        of.delete_registered_model(key)
        monkeypatch.undo()

    monkeypatch.setattr(leases, "_read", released)
    with lease(client, "m12", "promotion", "x", patience_s=0):
        pass


def test_a_process_that_proc_hides_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    boot, namespace, _ = leases._parts(leases._place())
    now = time.time()
    record = leases._Record("c", "of another user", socket.gethostname(), 2**22, f"{boot} {namespace} 7", now, now + 9)
    assert record.is_free  # there is no such process

    def refused(process: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    assert not record.is_free
