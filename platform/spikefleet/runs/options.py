"""Where a run or a search keeps its files, finds its data and runs: nothing here decides what is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Options of a command that trains."""

    runs_dir: Path = Path("runs")
    stores_dir: Path = Path("stores")
    address: str | None = None
    """Ray cluster, HOST:PORT; RAY_ADDRESS if not given."""
    verbose: bool = False
    """Show what Ray and its workers log."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of a search's trials that say where their data lie, such as `{"data.root": "/data/cifar"}`."""

    @property
    def searches_dir(self) -> Path:
        """Where searches keep their directories."""
        return self.runs_dir.resolve() / "searches"

    def trials_dir(self, search: str) -> Path:
        """The runs of a search's trials."""
        return self.searches_dir / search / "trials"
