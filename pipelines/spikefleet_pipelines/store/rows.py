"""The interface that transforms read: rows of a split, or images in memory."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.store.annotations import Annotations


class Rows(Protocol):
    """The part of `Split` that transforms use; `in_memory.py` implements it for images in memory."""

    @property
    def name(self) -> str:
        """Name of the split, for error messages."""
        ...

    @property
    def location(self) -> str:
        """Location of the store, for error messages."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of raw images; None for encoded ones, whose sizes vary."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [n]."""
        ...

    def __len__(self) -> int: ...

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy raw images into a batch [B, C, H, W]."""
        ...

    def views(self, rows: NDArray[np.int64]) -> Sequence[NDArray[np.uint8]]:
        """Return raw images [C, H, W] where they are, to be read only."""
        ...

    def image(self, row: int) -> Tensor:
        """Read one image, uint8 [C, H, W]."""
        ...

    def annotations(self, row: int) -> Annotations:
        """Return the objects of one image."""
        ...


class LabelTime(NamedTuple):
    """A sample of events for detection."""

    recording: int
    """Row of the recording."""
    frame: int
    """Number of the label time in the recording."""
    time: int
    """us from the start of the recording."""


class EventRows(Rows, Protocol):
    """The part of `EventSamples` that transforms use; samples in memory implement it too."""

    @property
    def source(self) -> str:
        """Name of the source, which declares what augmentations do to labels."""
        ...

    @property
    def sensor(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def recording(self, row: int) -> StoredRecording:
        """Return the recording of a sample."""
        ...

    def label_time(self, row: int) -> LabelTime:
        """Return recording and label time of a sample for detection."""
        ...

    def draw_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers by which samples are augmented: windows of one recording have the same."""
        ...
