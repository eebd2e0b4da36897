"""Declaration of a source: name, options, and import path of its reader.

This needs pydantic only: a config that names a source is checked without numpy, torch or pyarrow. The reader is
imported when data are prepared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from spikefleet_pipelines.errors import SourceError

if TYPE_CHECKING:
    from spikefleet_pipelines.store.event_format import EventFormat
    from spikefleet_pipelines.store.event_writer import EventStoreWriter
    from spikefleet_pipelines.store.manifest import ImageFormat
    from spikefleet_pipelines.store.writer import StoreWriter

Progress = Callable[[int, int], None]
"""Called with (images or recordings done, all of them)."""


class SourceOptions(BaseModel):
    """Base class of the options of a source; by itself it has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def holdout_field(default: float) -> Any:
    """Declare an option `holdout`: the fraction of the training images of each class that becomes val.

    A store records it only where it is not the default, so that stores of versions without the option keep their
    hashes.
    """
    return Field(
        default=default,
        ge=0.0,
        lt=1.0,
        exclude_if=partial(_is, default),
        description="fraction of the training images of each class that becomes val; 0: train on all of them",
    )


def recordings_holdout_field(default: float) -> Any:
    """Declare an option `holdout` of a source of recordings; stores record it always."""
    return Field(
        default=default,
        ge=0.0,
        lt=1.0,
        description="fraction of the training recordings of each class that becomes val; 0: train on all of them",
    )


def train_images_field() -> Any:
    """Declare an option `train_images`: how many training images are kept, the same fraction of each class.

    A store records it only where it is set, as `holdout_field`.
    """
    return Field(
        default=None,
        ge=1,
        exclude_if=partial(_is, None),
        description="number of training images that are kept after val is held out, the same fraction of each class; "
        "none: all",
    )


def _is(default: float | None, value: float | None) -> bool:
    return value == default


class Contents(Protocol):
    """Raw data that were found and checked, ready to be written to a store."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        ...

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """The category id of each class of a detection data set; None for classification."""
        ...

    @property
    def stand_ins(self) -> Mapping[str, str]:
        """Aliases of splits; see `StoreWriter`."""
        ...

    @property
    def image(self) -> "ImageFormat":
        """Format of the images."""
        ...

    def write(self, writer: "StoreWriter", progress: Progress, parallel: int | None) -> None:
        """Write all splits.

        Args:
            writer: of the store.
            progress: called with (images done, images in all).
            parallel: number of Ray tasks, as for `prepare`.
        """
        ...


@runtime_checkable
class EventContents(Protocol):
    """Recordings of an event camera that were found and checked, ready to be written to a store."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        ...

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """The category id of each class of a detection data set; None for classification."""
        ...

    @property
    def stand_ins(self) -> Mapping[str, str]:
        """Aliases of splits; see `StoreWriter`."""
        ...

    @property
    def events(self) -> "EventFormat":
        """Format of the events."""
        ...

    def write(self, writer: "EventStoreWriter", progress: Progress, parallel: int | None) -> None:
        """Write all splits, as `Contents.write`; progress counts recordings."""
        ...


Reader = Callable[[Path, Any, int], Contents | EventContents]
"""Finds and checks the raw data: (root, options, seed of the held-out samples) -> contents."""

SplitWriter = Callable[[Any, Path, Progress, int | None, int, bool, bool], None]
"""Writes a single split into a store: (options, out, progress, parallel, seed, overwrite, skip_bad) -> None."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set.

    Attributes:
        name: in configs and on the command line.
        description: one line for the list of sources.
        reader: import path of its `Reader`, "package.module:function"; imported when it is used.
        options: config class of the options.
        files: required content of `root`, for the error message about missing files; None where no files are needed.
        default_root: directory of the files when no root is given.
        split_writer: import path of its `SplitWriter`; None where splits cannot be prepared one by one.
        split_options: config class of the options of a single split; None without `split_writer`.
        events: whether its contents are recordings of events (`EventContents`) instead of images.
    """

    name: str
    description: str
    reader: str
    options: type[SourceOptions] = SourceOptions
    files: str | None = None
    default_root: Path | None = None
    split_writer: str | None = None
    split_options: type[SourceOptions] | None = None
    events: bool = False

    def load_reader(self) -> Reader:
        """Import the reader.

        Raises:
            ImportError: the reader's module, or a library that it needs, is not installed.
        """
        return _load(self.reader)

    def load_split_writer(self) -> SplitWriter | None:
        """Import the writer of single splits; None if the source has none.

        Raises:
            ImportError: the writer's module, or a library that it needs, is not installed.
        """
        return None if self.split_writer is None else _load(self.split_writer)

    def missing(self, looked: Path | None) -> SourceError:
        """Create the error for missing raw data; `looked` is the path that was searched, None without any root."""
        where = f"not found: {looked} is missing or lacks a file" if looked else "not found: root is not set"
        return SourceError(
            f"raw data of source {self.name!r} {where}; put {self.files} into a directory DIR and run "
            f"`spikefleet data prepare {self.name} DIR --out STORE`, or set data.root=DIR"
        )


def _load(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)
