"""Options that do not affect the result of training: directories, cluster address, location of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Options of a command that trains."""

    runs_dir: Path = Path("runs")
    """Directory of runs and searches."""
    stores_dir: Path = Path("stores")
    """Directory of prepared stores."""
    address: str | None = None
    """HOST:PORT of the Ray cluster; default: RAY_ADDRESS."""
    verbose: bool = False
    """Show the logs of Ray and of its workers."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides with the location of a search's data, such as `{"data.root": "/data/cifar"}`."""
    promote: bool = True
    """Compare the registered version with the champion; if not, it stays challenger."""
    parent_run: str | None = None
    """MLflow's id of the run that a training is a part of."""

    @property
    def searches_dir(self) -> Path:
        """Directory of all searches."""
        return self.runs_dir.resolve() / "searches"

    def trials_dir(self, search: str) -> Path:
        """Directory of the runs of a search's trials."""
        return self.searches_dir / search / "trials"
