"""MLflow's database, whose schema is built once a process and then copied: its fifty migrations take a second."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from spikefleet.tracking import database


class BuiltOnce:
    """Stands for `database._build`, and calls it for the first database.

    Args:
        folder: keeps what is copied.
    """

    def __init__(self, folder: Path) -> None:
        self._build, self._built = database._build, folder / "mlflow.db"
        self._guard = threading.Lock()

    def __call__(self, path: Path) -> None:
        with self._guard:
            if not self._built.exists():
                unfinished = self._built.with_suffix(".unfinished")
                unfinished.unlink(missing_ok=True)
                self._build(unfinished)
                unfinished.replace(self._built)
        shutil.copyfile(self._built, path)
