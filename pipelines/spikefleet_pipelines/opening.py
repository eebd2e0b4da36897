"""Opening the store of a config's data section, after preparing it where only raw data exist."""

from pathlib import Path
from typing import Any

from spikefleet_pipelines.data_config import DataConfig, store_name
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import Progress, prepare
from spikefleet_pipelines.store.reader import Store


def open_or_prepare(
    config: DataConfig,
    stores_dir: Path,
    progress: Progress | None = None,
    parallel: int | None = None,
    verify: bool = True,
) -> Store:
    """Open the store of a config; prepare it first where only raw data exist.

    The search order is: a store at `config.store`; a store at `config.root`; the store that an earlier call prepared in
    `stores_dir`; raw files at `config.root` or at the source's default. Concurrent processes get the same store: each
    builds its own, and the first one that finishes is kept.

    Args:
        config: the data section of the config.
        stores_dir: directory of prepared stores.
        progress: called with (images done, images in all) while a store is prepared.
        parallel: number of Ray tasks, as for `prepare`.
        verify: check the SHA-256 of every shard.

    Raises:
        StoreError: `config.store` is not a store or belongs to another source, or a shard is corrupt.
        SourceError: there are no data; the message says where they were searched and how to prepare them.
    """
    if config.store is not None:
        return _of_source(Store.open(config.store, verify=verify), config)
    if config.root is not None and Store.is_store(config.root):
        return _of_source(Store.open(config.root, verify=verify), config)
    out = stores_dir / store_name(config)
    if Store.is_store(out):
        return _of_source(Store.open(out, verify=verify), config)
    options: dict[str, Any] = dict(config.options)
    return prepare(config.source, config.root, out, progress=progress, parallel=parallel, seed=config.seed, **options)


def _of_source(store: Store, config: DataConfig) -> Store:
    if store.manifest.source != config.source:
        raise StoreError(
            f"{store.location} is a store of source {store.manifest.source!r}, expected {config.source!r}; set "
            "data.source or choose another store"
        )
    return store
