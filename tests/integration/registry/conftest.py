"""One registry in SQLite that all modules of this folder share, with one tiny network in it.

It is made once a process, for that takes seconds; so each test registers under names of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet.registry.api import RegisteredVersion, promote, pull
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from support.registered import Trained, trained


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def uri(runs: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return resolve_tracking_uri(runs)


@pytest.fixture(scope="session")
def first(runs: Path, uri: str) -> Trained:
    return trained(runs, uri)


@pytest.fixture(scope="session")
def registered(first: Trained) -> RegisteredVersion:
    version = first.register("digits")
    promote("digits", version.version, "val/top1", tracking_uri=first.uri)
    return version


@pytest.fixture
def pulled(registered: RegisteredVersion, uri: str, tmp_path: Path) -> Path:
    return pull("models:/digits@champion", tmp_path / "pulled", tracking_uri=uri)


@pytest.fixture
def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
