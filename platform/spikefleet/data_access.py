"""Stores as the command line meets them: opened, or prepared under a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spikefleet.cluster.session import quiet_ray, ray_session
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store


def open_data(config: DataConfig, stores_dir: Path, console: Console) -> Store:
    """The store that a configuration asks for, prepared now if it is not there yet and its files are.

    Raises SourceError or StoreError: where was looked, and how to prepare the data.
    """
    quiet_ray()
    with _shown(console, f"preparing {config.source}") as progress:
        return open_or_prepare(config, stores_dir.resolve(), progress=progress)


def prepare_store(
    source: str,
    root: Path | None,
    out: Path,
    console: Console,
    options: Mapping[str, Any],
    *,
    address: str | None = None,
    **how: Any,
) -> Store:
    """Converts a data set into a store at `out`; on the cluster at `address` or RAY_ADDRESS, whose nodes see both."""
    quiet_ray()
    cluster = ray_session(address) if address or os.environ.get("RAY_ADDRESS") else nullcontext()
    with cluster, _shown(console, f"preparing {source}") as progress:
        return prepare(source, root, out, progress=progress, **how, **options)


@contextmanager
def _shown(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first image, on a terminal; a line when it is done, elsewhere."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, visible=False)
        done_of = (0, 0)

        def progress(done: int, total: int) -> None:
            nonlocal done_of
            done_of = (done, total)
            bar.update(task, completed=done, total=total, visible=True)

        yield progress
    if done_of[1]:
        console.print(f"{title}: {done_of[0]} images", highlight=False)
