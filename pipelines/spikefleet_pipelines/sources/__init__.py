"""Sources: the data sets that can be prepared, and how.

To add one: a file here with a `Source`, and its line in `SOURCES`.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources.cifar import CIFAR10, CIFAR100
from spikefleet_pipelines.sources.coco import COCO
from spikefleet_pipelines.sources.digits import DIGITS
from spikefleet_pipelines.sources.fashion_mnist import FASHION_MNIST
from spikefleet_pipelines.sources.image_folder import IMAGE_FOLDER
from spikefleet_pipelines.sources.scenes import SCENES
from spikefleet_pipelines.sources.source import Progress, Source, SourceOptions
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter

__all__ = [
    "SOURCES",
    "Progress",
    "Source",
    "check_options",
    "find_source",
    "list_sources",
    "prepare",
]

SOURCES: dict[str, Source] = {
    source.name: source for source in (DIGITS, FASHION_MNIST, CIFAR10, CIFAR100, IMAGE_FOLDER, SCENES, COCO)
}


def list_sources() -> list[str]:
    """The names that `prepare` takes."""
    return list(SOURCES)


def find_source(name: str) -> Source:
    """A source by its name.

    Raises:
        SourceError: there is none; names the nearest.
    """
    if name in SOURCES:
        return SOURCES[name]
    nearest = difflib.get_close_matches(name, SOURCES, 1, 0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it must be one of {', '.join(SOURCES)}."
    raise SourceError(f"Unknown data source {name!r}; {hint}")


def check_options(source: Source, options: dict[str, Any], model: type[SourceOptions] | None = None) -> SourceOptions:
    """The options of a source, checked; `model` says which, if not those of the whole data set.

    Raises:
        SourceError: an option is unknown or missing, or its value is not allowed.
    """
    model = model or source.options
    try:
        return model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(model.model_fields) or "none"
        value = "is missing" if first["type"] == "missing" else f"has value {first['input']!r}: {first['msg']}"
        raise SourceError(
            f"Option {option!r} of source {source.name!r} {value}. Its options are: {allowed}."
        ) from error


def prepare(
    name: str,
    root: Path | None,
    out: Path,
    *,
    progress: Progress | None = None,
    parallel: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> Store:
    """Build a store from raw data.

    If `out` already holds a store of the same source, options and seed, that one is opened. The store appears at `out`
    only when it is complete.

    Source "coco" also takes one split by itself, with options `images`, `annotations` and `split`: it becomes a store,
    or is added to the one at `out`. See `coco.py`.

    Args:
        name: of the source.
        root: directory of the raw files; None for the source's default.
        out: directory of the store.
        progress: called with (images done, images in all).
        parallel: number of Ray tasks that convert encoded images. None: as many as the running Ray has CPUs, or this
            machine where there is none and there is much to convert. More than 1 starts a local Ray if there is none.
        seed: chooses the samples that are held out of the training data for val (and for test where the source has
            none).
        overwrite: replace another store at `out`.

    Raises:
        SourceError: unknown source or option; raw data missing or damaged (names the file).
        StoreError: `out` holds something else.
    """
    source = find_source(name)
    if source.prepare_split is not None and source.split_options is not None and "split" in options:
        if root is not None:
            raise SourceError(f"A split of {name!r} is given by options images and annotations; leave root {root} out.")
        of_split = check_options(source, options, source.split_options)
        with _writing(out):
            source.prepare_split(of_split, out.resolve(), progress or _quiet, parallel, seed, overwrite)
        return Store.open(out, verify=False)
    checked = check_options(source, options)
    recorded = {**checked.model_dump(mode="json"), "seed": seed}
    if Store.is_store(out) and not overwrite:
        store = Store.open(out)
        if (store.manifest.source, store.manifest.options) == (name, recorded):
            return store
        raise StoreError(
            f"{out} already holds a store of {store.manifest.source!r} with {store.manifest.options}, not of {name!r} "
            f"with {recorded}; choose another directory or overwrite it."
        )
    if out.is_dir() and not Store.is_store(out) and any(out.iterdir()):
        raise StoreError(f"{out} is not empty and not a store; choose another directory.")
    if source.files is None and root is not None:
        raise SourceError(f"Source {name!r} is built in and reads no files; leave its root {root} out.")
    root = root or source.default_root
    if source.files is not None and (root is None or not root.is_dir()):
        raise source.missing(root)
    contents = source.read(root or Path(), checked, seed)
    out = out.resolve()
    with (
        _writing(out),
        StoreWriter(
            out,
            source=name,
            class_names=contents.class_names,
            image=contents.image,
            options=recorded,
            overwrite=overwrite,
            category_ids=contents.category_ids,
            stand_ins=contents.stand_ins,
        ) as writer,
    ):
        contents.write(writer, progress or _quiet, parallel)
        writer.commit()
    return Store.open(out, verify=False)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"The store {out} cannot be written: {error}; check the space and the permissions.") from error


def _quiet(done: int, total: int) -> None:
    pass
