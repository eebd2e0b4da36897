"""A small finished run with its registered version, of which tests break copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.finished import NAME, SMALL


@pytest.fixture(scope="session")
def finished(stores_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with the run `small`, whose best checkpoint is registered."""
    from rich.console import Console

    from spikefleet.config.recipes import load_config, parse_overrides
    from spikefleet.runs.options import Options
    from spikefleet.runs.train_run import run_training

    runs = tmp_path_factory.mktemp("finished") / "runs"
    config = load_config("digits", parse_overrides(SMALL))
    run_training(config, Options(runs, stores_dir), Console(quiet=True), NAME)
    return runs


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies the runs directory to a place in the test's own directory."""

    def copy(name: str = "runs") -> Path:
        return Path(shutil.copytree(finished, tmp_path / name))

    return copy
