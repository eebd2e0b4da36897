"""Sources: the data sets that can be prepared.

A source consists of two modules, `X_config.py` (pydantic only) and `X.py` (the reader), and a line in `registry.py`.
Listing sources and checking options imports no reader; `prepare` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources.registry import check_options, find_source, list_sources, register_source
from spikefleet_pipelines.sources.source import Contents, EventContents, Progress, Source, SourceOptions

if TYPE_CHECKING:
    from spikefleet_pipelines.store.origin import Origin
    from spikefleet_pipelines.store.reader import Store
    from spikefleet_pipelines.store.writer import StoreWriter

__all__ = [
    "Progress",
    "Source",
    "SourceOptions",
    "check_options",
    "find_source",
    "list_sources",
    "prepare",
    "register_source",
]


def prepare(
    name: str,
    root: Path | None,
    out: Path,
    *,
    progress: Progress | None = None,
    parallel: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    skip_bad: bool = False,
    check_content: bool = False,
    dataset: str | None = None,
    **options: Any,
) -> "Store":
    """Build a store from raw data.

    If `out` already contains a store of the same source, options and seed, it is opened. The store appears at `out`
    only when it is complete.

    Source "coco" can also prepare a single split, with options `images`, `annotations` and `split`: it becomes a new
    store, or is added to the one at `out`. See `coco.py`.

    Args:
        name: of the source.
        root: directory of the raw files; None for the source's default.
        out: directory of the store.
        progress: called with (images done, images in all).
        parallel: number of Ray tasks that convert encoded images. None: one per CPU of the running Ray or, without Ray
            and with many images, of this machine. More than 1 starts a local Ray if none is running.
        seed: selects the samples held out of the training data for val (and for test where the source has none).
        overwrite: replace another store at `out`.
        skip_bad: leave out images and recordings that are missing or cannot be read, and list them in the manifest.
        check_content: compare the raw files with those of a store at `out` by content, although names, sizes and times
            agree.
        dataset: name of the data set, which a store that is there gets too; None: the default of
            `store/data_set_name.py`, or the name that the store has.
        **options: of the source.

    Returns:
        The opened store.

    Raises:
        SourceError: the source or an option is unknown, or raw data are missing or damaged (the message names the
            file).
        StoreError: `out` contains something else, or the data set cannot have this name.
        ImportError: a library that the source needs is not installed.
    """
    from spikefleet_pipelines.store.data_set_name import check_data_set_name, name_after
    from spikefleet_pipelines.store.reader import Store

    source = find_source(name)
    if dataset is not None:
        check_data_set_name(dataset)
    split_writer = source.load_split_writer()
    if split_writer is not None and source.split_options is not None and "split" in options:
        if root is not None:
            raise SourceError(
                f"source {name!r}: root is {root}, but a single split is given by the options images and annotations; "
                "remove root"
            )
        if check_content:
            raise SourceError(
                f"source {name!r}: check_content compares the files in root, but a single split is given by images and "
                "annotations; leave out check_content, and prepare a split anew by overwrite"
            )
        of_split = check_options(source, options, source.split_options)
        with _writing(out):
            split_writer(of_split, out.resolve(), progress or _quiet, parallel, seed, overwrite, skip_bad)
        return _renamed(Store.open(out, verify=False), dataset)
    checked = check_options(source, options)
    recorded = {**checked.model_dump(mode="json"), "seed": seed}
    origin = None if source.files is None else _origin_of(root or source.default_root, out, check_content)
    if Store.is_store(out) and not overwrite:
        store = Store.open(out)
        if (store.manifest.source, store.manifest.options) == (name, recorded):
            _refuse_changed_files(out, origin)
            return _renamed(store, dataset)
        raise StoreError(
            f"{out} already contains a store of {store.manifest.source!r} with {store.manifest.options}, expected "
            f"{name!r} with {recorded}; choose another directory or use --overwrite"
        )
    if out.is_dir() and not Store.is_store(out) and any(out.iterdir()):
        raise StoreError(f"{out} is neither empty nor a store; choose another directory")
    if source.files is None and root is not None:
        raise SourceError(
            f"source {name!r}: root is {root}, but the source is built in and reads no files; remove root"
        )
    root = root or source.default_root
    if source.files is not None and (root is None or not root.is_dir()):
        raise source.missing(root)
    reader = source.load_reader()
    with _reading(name, root):
        contents = reader(root or Path(), checked, seed)
    out = out.resolve()
    with _writing(out):
        _write(
            contents,
            out,
            origin,
            progress or _quiet,
            parallel,
            source=name,
            class_names=contents.class_names,
            options=recorded,
            overwrite=overwrite,
            category_ids=contents.category_ids,
            stand_ins=contents.stand_ins,
            name=dataset,
            otherwise=None if root is None else name_after(root, name),
            skip_bad=skip_bad,
        )
    return _renamed(Store.open(out, verify=False), dataset)  # another process may have written it


def _write(
    contents: Contents | EventContents,
    out: Path,
    origin: "Origin | None",
    progress: Progress,
    parallel: int | None,
    **how: Any,
) -> None:
    """Write a store; `how` are arguments of its writer."""
    from spikefleet_pipelines.store.event_writer import EventStoreWriter
    from spikefleet_pipelines.store.writer import StoreWriter

    if isinstance(contents, EventContents):
        with EventStoreWriter(out, events=contents.events, **how) as of_events:
            contents.write(of_events, progress, parallel)
            _commit(of_events, origin)
        return
    with StoreWriter(out, image=contents.image, **how) as of_images:
        contents.write(of_images, progress, parallel)
        _commit(of_images, origin)


def _commit(writer: "StoreWriter", origin: "Origin | None") -> None:
    if origin is not None:
        _record_origin(origin, writer)
    writer.commit()


def _renamed(store: "Store", dataset: str | None) -> "Store":
    """The store, after its data set got a name that was asked for."""
    from spikefleet_pipelines.store.extension import rename_data_set

    if dataset is None or store.manifest.name == dataset:
        return store
    with _writing(Path(store.location)):
        rename_data_set(Path(store.location), dataset)
    return type(store).open(store.location, verify=False)


def _origin_of(root: Path | None, out: Path, check_content: bool) -> "Origin | None":
    """The raw files, before they are read; None where there are none, which is complained about later."""
    from spikefleet_pipelines.store.origin import Origin

    besides = [out.parent.absolute()]
    try:
        if root is None or not root.is_dir():
            return None
        origin = Origin.of(root, besides)
        return origin.with_content(besides) if check_content and out.is_dir() else origin
    except OSError as error:
        raise SourceError(f"{root} cannot be read: {error}") from error


def _refuse_changed_files(out: Path, origin: "Origin | None") -> None:
    from spikefleet_pipelines.store.manifest import MANIFEST_NAME
    from spikefleet_pipelines.store.origin import is_built_from

    if origin is None:
        return
    written = (out / MANIFEST_NAME).stat().st_mtime_ns
    if not is_built_from(out, origin, written, [out.parent.absolute()]):
        other = out.with_name(Path(origin.root).name)
        raise StoreError(
            f"{out} was prepared from other files than those that are in {origin.root} now; use --overwrite to prepare "
            f"these in its place, or choose another directory{'' if other.exists() else f', such as --out {other}'}"
        )


def _record_origin(origin: "Origin", writer: "StoreWriter") -> None:
    """Records what a store was built from. Raises StoreError if the files changed meanwhile."""
    besides = [writer.out.parent.absolute()]
    after = type(origin).of(Path(origin.root), besides)
    if (after.listing, after.times) != (origin.listing, origin.times):
        raise StoreError(f"the files in {origin.root} changed while they were read; prepare the store again")
    origin.with_content(besides).write(writer.directory)


@contextmanager
def _reading(name: str, root: Path | None) -> Iterator[None]:
    """What a file from elsewhere can make a reader fail with, beyond what the reader names itself."""
    try:
        yield
    except (SourceError, StoreError):
        raise
    except (OSError, MemoryError, RecursionError, ArithmeticError, UnicodeError) as error:
        reason = str(error) or type(error).__name__
        raise SourceError(f"source {name!r}: the files in {root} cannot be read: {reason}; replace them") from error


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"store {out} cannot be written: {error}; check the free space and the permissions") from error


def _quiet(done: int, total: int) -> None:
    pass
