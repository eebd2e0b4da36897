"""What a source is, as far as it can be said without reading anything: name, options, and where its reader is.

pydantic only: a config that names a source is checked without numpy, torch or pyarrow. The reader is imported when data
is prepared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from spikefleet_pipelines.errors import SourceError

if TYPE_CHECKING:
    from spikefleet_pipelines.store.manifest import ImageFormat
    from spikefleet_pipelines.store.writer import StoreWriter

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


class SourceOptions(BaseModel):
    """Options of a source; a source with more of them subclasses this."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Contents(Protocol):
    """Raw data that was found and looked through, ready to be written."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """Of a detection data set, the id of each class in the annotations."""
        ...

    @property
    def stand_ins(self) -> Mapping[str, str]:
        """Splits that are another one under a second name: see `StoreWriter`."""
        ...

    @property
    def image(self) -> "ImageFormat": ...
    def write(self, writer: "StoreWriter", progress: Progress, parallel: int | None) -> None: ...


Reader = Callable[[Path, Any, int], Contents]
"""Finds and checks the raw data: (root, options, seed of the held-out samples) -> contents."""

SplitWriter = Callable[[Any, Path, Progress, int | None, int, bool], None]
"""Puts one split, given by itself, into a store: (options, out, progress, parallel, seed, overwrite) -> nothing."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set.

    Attributes:
        name: by which configs and the command line call it.
        description: one line for who lists the sources.
        reader: where its `Reader` is, as "package.module:function"; imported when it is used.
        options: what can be chosen.
        files: what `root` must hold, for the sentence that says that it is missing; None where no files are needed.
        default_root: where the files are looked for when no root is given.
        split_writer: where its `SplitWriter` is; None where splits cannot be given one by one.
        split_options: the options by which one split is given; None where there is no `split_writer`.
    """

    name: str
    description: str
    reader: str
    options: type[SourceOptions] = SourceOptions
    files: str | None = None
    default_root: Path | None = None
    split_writer: str | None = None
    split_options: type[SourceOptions] | None = None

    def load_reader(self) -> Reader:
        """Import the reader.

        Raises:
            ImportError: the reader's module, or a library that it needs, is not there.
        """
        return _load(self.reader)

    def load_split_writer(self) -> SplitWriter | None:
        """Import the writer of single splits, if the source has one. Raises as `load_reader`."""
        return None if self.split_writer is None else _load(self.split_writer)

    def missing(self, looked: Path | None) -> SourceError:
        """The error for raw data that is not there: where it was looked for, and what to do."""
        where = (
            f"not found: {looked} is missing or lacks a file" if looked else "not given a root, and it has no default"
        )
        return SourceError(
            f"The raw data of {self.name!r} was {where}. Put {self.files} in a directory DIR and run "
            f"`spikefleet data prepare {self.name} DIR --out STORE`, or set the data's root to DIR"
        )


def _load(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)
