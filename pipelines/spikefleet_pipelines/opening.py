"""From the data part of a config to an open store, which is prepared first if only raw data is there."""

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
    """Open the store of a config; prepare it first if only raw data is there.

    Looked for, in this order: a store at `config.store`; a store at `config.root`; the store that an earlier call left
    in `stores_dir`; raw files at `config.root`, or where the source has them by default. Processes that race here end
    with the same store: each builds its own, and the first one to finish stays.

    Raises:
        StoreError: `config.store` is no store or one of another source, or a shard is corrupt.
        SourceError: there is no data; the sentence says where it was looked for and how to prepare it.
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
            f"{store.location} is a store of source {store.manifest.source!r}, and the config asks for "
            f"{config.source!r}; change data.source or the store"
        )
    return store
