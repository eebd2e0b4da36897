"""Opening the store of a config's data section, after preparing it where only raw data exist."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikefleet_pipelines.data_config import DataConfig, store_name
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import Progress, check_options, find_source, prepare
from spikefleet_pipelines.store.manifest import MANIFEST_NAME
from spikefleet_pipelines.store.origin import Origin, is_built_from
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.kinds import transform_kinds

_DIGEST = 8
"""Hexadecimal digits in the name of a store that was prepared beside an earlier one."""


def open_or_prepare(
    config: DataConfig,
    stores_dir: Path,
    progress: Progress | None = None,
    parallel: int | None = None,
    verify: bool = True,
    say: Callable[[str], None] | None = None,
) -> Store:
    """Open the store of a config; prepare it first where only raw data exist.

    The search order is: a store at `config.store`; a store at `config.root`; the store that an earlier call prepared in
    `stores_dir` from the same files; raw files at `config.root` or at the source's default. If files were added,
    removed or changed, a new store is prepared beside the old one; `config.check_content` compares contents although
    names, sizes and times agree. Concurrent processes get the same store: each builds
    its own, and the first one that finishes is kept.

    Args:
        config: the data section of the config.
        stores_dir: directory of prepared stores.
        progress: called with (images done, images in all) while a store is prepared.
        parallel: number of Ray tasks, as for `prepare`.
        verify: check the SHA-256 of every shard.
        say: called with a sentence where an earlier store is not used, or its files are gone.

    Raises:
        StoreError: `config.store` is not a store or belongs to another source, or a shard is corrupt.
        SourceError: there are no data (the message says where they were searched and how to prepare them), or the
            kind of the transform does not read what the source has, events or images.
    """
    _check_kind(config, find_source(config.source).events, f"data.source={config.source}")
    if config.store is not None:
        return _of_source(Store.open(config.store, verify=verify), config)
    if config.root is not None and Store.is_store(config.root):
        return _of_source(Store.open(config.root, verify=verify), config)
    out = stores_dir / store_name(config)
    root = config.root or find_source(config.source).default_root
    there, target = _prepared_from(root, out, config.root is not None, config.check_content, say or _silent)
    if there is not None:
        store = _of_source(Store.open(there, verify=verify), config)
        if others := _other_options(store, config):
            remedy = "used as it is; remove it, or set data.store to another one"
            (say or _silent)(f"{store.location} was prepared with {others}: {remedy}")
        return store
    options: dict[str, Any] = dict(config.options)
    return prepare(
        config.source, config.root, target, progress=progress, parallel=parallel, seed=config.seed, **options
    )


def _prepared_from(
    root: Path | None, out: Path, named: bool, check_content: bool, say: Callable[[str], None]
) -> tuple[Path | None, Path]:
    """The store that was prepared from the files in `root`, if there is one, and where to prepare it otherwise.

    Args:
        root: directory of the raw files; None for a source without any.
        out: place of the first store.
        named: the config names `root`; if not, `out` may be a store that the user prepared from elsewhere.
        check_content: compare contents although names, sizes and times agree.
        say: called with what the user should know.
    """
    # Not "-*": a store of other options is named by a longer digest.
    besides = sorted(out.parent.glob(f"{out.name}-{'[0-9a-f]' * _DIGEST}"))
    stores = [path for path in (out, *besides) if Store.is_store(path)]
    if not stores or root is None:
        return (stores[0] if stores else None), out
    record = Origin.read(out)
    if not named and (record is None or record.root != str(root.absolute())):
        return (out if Store.is_store(out) else None), out
    if not root.is_dir():
        newest = max(stores, key=_written_ns)
        say(f"{root} is not there any more; using the store that was prepared from it")
        return newest, out
    left_out = [out.parent.absolute()]
    try:
        now = Origin.of(root, left_out)
        if check_content:
            say(f"comparing the contents of {now.files:,} files in {root}")
            now = now.with_content(left_out)
        for store in sorted(stores, key=_written_ns, reverse=True):
            if is_built_from(store, now, _written_ns(store), left_out):
                return store, out
    except OSError as error:
        raise SourceError(f"{root} cannot be read: {error}") from error
    if not Store.is_store(out):
        return None, out
    say(f"the files in {root} are not those that {max(stores, key=_written_ns)} was prepared from: preparing them anew")
    identity = " ".join(filter(None, (now.listing, now.times, now.content)))
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return None, out.with_name(f"{out.name}-{digest[:_DIGEST]}")


def _written_ns(store: Path) -> int:
    return (store / MANIFEST_NAME).stat().st_mtime_ns


def _silent(sentence: str) -> None:
    pass


def _check_kind(config: DataConfig, events: bool, what: str) -> None:
    """Raises SourceError unless the transform reads what there is, events or images."""
    transform = config.transform
    if transform.reads_events != events:
        there, kinds = ("recordings of events" if events else "images"), transform_kinds(transform.store_task, events)
        raise SourceError(
            f"{what} has {there}, but data.transform.kind is {transform.kind!r}; set data.transform.kind to "
            f"{' or '.join(map(repr, kinds))}"
        )


def _other_options(store: Store, config: DataConfig) -> str:
    """Say which options of a store that the user prepared are not the config's; empty if none or unknown."""
    source = find_source(config.source)
    recorded = dict(store.manifest.options)
    seed = recorded.pop("seed", config.seed)
    try:
        had = check_options(source, recorded).model_dump(mode="json")
    except SourceError:
        return ""
    asked = check_options(source, config.options).model_dump(mode="json")
    different = [
        f"{name}={had[name]} where data.options has {asked[name]}" for name in asked if had[name] != asked[name]
    ]
    if seed != config.seed:
        different.append(f"seed={seed} where data.seed is {config.seed}")
    return ", ".join(different)


def _of_source(store: Store, config: DataConfig) -> Store:
    if store.manifest.source != config.source:
        raise StoreError(
            f"{store.location} is a store of source {store.manifest.source!r}, expected {config.source!r}; set "
            f"data.source={store.manifest.source}, or choose another store"
        )
    _check_kind(config, store.manifest.events is not None, store.location)
    return store
