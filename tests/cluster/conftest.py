"""One cluster of three hosts for all tests here, and one clean run that the others are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster_runs import Training
from support.hosts import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts: the head without CPUs, two with one CPU each. All are there when a test begins."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("hosts")) as started:
        yield started


@pytest.fixture
def hosts(cluster: Cluster) -> Cluster:
    """The cluster with all its hosts, whatever the test before has killed."""
    cluster.mend()
    return cluster


@pytest.fixture(scope="session")
def clean(cluster: Cluster, stores_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training on two hosts without a fault."""
    run = Training(cluster, tmp_path_factory.mktemp("clean"), stores_dir)
    run.start()
    run.finish()
    return run
