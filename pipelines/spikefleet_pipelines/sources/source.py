"""What a source is: how the raw files of one data set become the splits of a store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from spikefleet_pipelines.counter_random import Draw, random_bits
from spikefleet_pipelines.errors import SourceError
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
    def image(self) -> ImageFormat: ...
    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None: ...


@dataclass(frozen=True)
class ArrayContents:
    """A data set small enough for memory: for each split, images uint8 [n, C, H, W] and labels int64 [n]."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
    category_ids: tuple[int, ...] | None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def image(self) -> ImageFormat:
        _, channels, height, width = self.splits["train"][0].shape
        return ImageFormat(encoding="raw", shape=(channels, height, width))

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        total, done = sum(len(labels) for _, labels in self.splits.values()), 0
        for split, (images, labels) in self.splits.items():
            writer.write_images(split, images, labels)
            done += len(labels)
            progress(done, total)


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        read: finds and checks the raw data: (root, options, seed of the held-out samples) -> contents.
        files: what `root` must hold, for the sentence that says that it is missing; None where no files are needed.
        default_root: where the files are looked for when no root is given.
        prepare_split: puts one split, given by itself, into a store: (options, out, progress, parallel, seed,
            overwrite) -> nothing.
        split_options: the options by which a split is given; None where `prepare_split` is.
    """

    name: str
    description: str
    read: Callable[[Path, SourceOptions, int], Contents]
    options: type[SourceOptions] = SourceOptions
    files: str | None = None
    default_root: Path | None = None
    prepare_split: Callable[[SourceOptions, Path, Progress, int | None, int, bool], None] | None = None
    split_options: type[SourceOptions] | None = None

    def missing(self, looked: Path | None) -> SourceError:
        """The error for raw data that is not there: where it was looked for, and what to do."""
        where = (
            f"not found: {looked} is missing or lacks a file" if looked else "not given a root, and it has no default"
        )
        return SourceError(
            f"The raw data of {self.name!r} was {where}. Put {self.files} in a directory DIR and run "
            f"`spikefleet data prepare {self.name} DIR --out STORE`, or set the data's root to DIR."
        )


def held_out(labels: NDArray[np.int64], count: Callable[[int], int], seed: int) -> NDArray[np.bool_]:
    """Choose the samples of each class to hold out, [n]: the `count(size of the class)` with the smallest hash."""
    keys = random_bits(seed, 0, np.arange(len(labels)), Draw.HOLD_OUT)
    chosen = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(keys[members], kind="stable")[: count(len(members))]]] = True
    return chosen


def hold_out_validation(
    images: NDArray[np.uint8], labels: NDArray[np.int64], count: Callable[[int], int], seed: int
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Split training data into "train" and "val"."""
    val = held_out(labels, count, seed)
    return {"train": (images[~val], labels[~val]), "val": (images[val], labels[val])}
