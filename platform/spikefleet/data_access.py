"""Stores as the command line meets them: opened, or prepared under a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet.cluster.session import quiet_ray, ray_session
from spikefleet.outputs import check_place
from spikefleet.status import counting, print_line, waiting
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import find_source, prepare
from spikefleet_pipelines.store.image_files import counted_reasons
from spikefleet_pipelines.store.reader import Store


def open_data(config: DataConfig, stores_dir: Path, console: Console) -> Store:
    """The store that a configuration asks for, prepared now if it is not there yet and its files are.

    Raises SourceError or StoreError: where was looked, and how to prepare the data.
    """
    quiet_ray()
    if config.store is None:
        check_place(stores_dir, "--stores-dir")
    prepared = False
    with _shown(console, f"preparing {config.source}") as count:

        def progress(done: int, total: int) -> None:
            nonlocal prepared
            prepared = True
            count(done, total)

        store = open_or_prepare(
            config, stores_dir.resolve(), progress=progress, say=lambda sentence: print_line(console, sentence)
        )
    print_line(console, f"data: {store.location} ({store.manifest.name})")
    if prepared and store.manifest.audit.unused:
        print_line(console, f"not used: {counted_reasons(store.manifest.audit.unused)}")
    if prepared:
        _say_splits_of_folders(console, config.root, store)
    return store


def _say_splits_of_folders(console: Console, root: Path | None, store: Store) -> None:
    """Says where val and test come from if an image folder has at most one folder beside train."""
    manifest = store.manifest
    if manifest.source != "image_folder" or root is None:
        return
    given = [name for name in ("val", "valid", "validation", "test") if (root / name).is_dir()]
    if not given and "val" in manifest.splits:
        print_line(
            console,
            f"val: {manifest.splits['val']:,} images held out of train, since there is no val folder (option holdout=0 "
            "holds none out); test: the same images",
        )
    if len(given) == 1 and not manifest.audit.same_as:
        print_line(
            console,
            f"test: the images of {root / given[0]}; val: {manifest.splits['val']:,} images held out of train, since "
            "there is one folder beside it (option holdout=0 holds none out)",
        )


def store_at(location: str, stores_dir: Path) -> str:
    """A store's path or URI; where there is no store at such a path, a name in `stores_dir`.

    A folder of raw images often has the name of the store that was prepared from it.
    """
    if "://" in location or Store.is_store(location):
        return location
    named = stores_dir / location
    there = Store.is_store(named) or (not Path(location).exists() and named.is_dir())
    return str(named) if there else location


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
    check_place(out, "--out")
    with ExitStack() as cluster:
        if address or os.environ.get("RAY_ADDRESS"):
            with waiting(console, "connecting to Ray"):
                cluster.enter_context(ray_session(address))
        title = f"preparing {source}"
        what = "recordings" if find_source(source).events else "images"
        with _shown(console, title, f"{out} was prepared before", what) as progress:
            store = prepare(source, root, out, progress=progress, **how, **options)
    _say_splits_of_folders(console, root, store)
    return store


@contextmanager
def _shown(
    console: Console, title: str, otherwise: str = "", what: str = "images"
) -> Iterator[Callable[[int, int], None]]:
    """Progress with rate and remaining time, and a line with the number of images when it is done.

    Args:
        console: where.
        title: what is done.
        otherwise: the line where nothing had to be done; an empty string: none.
        what: is counted.
    """
    done_of = (0, 0)
    with counting(console, title, what) as count:

        def progress(done: int, total: int) -> None:
            nonlocal done_of
            done_of = (done, total)
            count(done, total)

        yield progress
    if done_of[1]:
        print_line(console, f"{title}: {done_of[0]:,} {what}")
    elif otherwise:
        print_line(console, otherwise)
