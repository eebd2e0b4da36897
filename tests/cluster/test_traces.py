"""What all tests here have left behind, looked at last: no secret of the hosts' environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster_runs import Training
from support.hosts import CANARIES, TOOLS, Cluster

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600), pytest.mark.traces]


def files_of(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """Everything that runs and Ray have written: run directories, databases, logs of sessions."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path != cluster.token_file:
            yield path


def before(content: bytes, secret: str) -> str:
    """What precedes a secret where it stands first: enough to say who wrote it there."""
    at = content.index(secret.encode())
    return content[max(0, at - 600) : at].decode(errors="replace")


def test_no_secret_of_the_environment_is_in_a_log_a_database_a_run_or_a_job(
    hosts: Cluster, clean: Training, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secrets = [hosts.token_file.read_text(), *(value for name, value in CANARIES.items() if "USER" not in name)]
    looked_at = 0
    found = []
    for path in files_of(hosts, tmp_path_factory.getbasetemp()):
        content = path.read_bytes()
        looked_at += 1
        found += [f"{path}: {before(content, secret)!r}" for secret in secrets if secret.encode() in content]
    assert found == []
    assert looked_at > 100
    seen = hosts.workers[0].call([str(TOOLS / "spikefleet"), "status", "--json", "--address", hosts.dashboard])
    assert not [secret for secret in secrets if secret in seen]
    planted = clean.run_dir / "report" / "planted.json"
    planted.write_text(json.dumps({"password": CANARIES["POSTGRES_PASSWORD"]}))
    try:
        assert planted in set(files_of(hosts, tmp_path_factory.getbasetemp())), "one that is there would be found"
    finally:
        planted.unlink()
