"""What a transform reads: the rows of a split, or images that stand in for them."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.store.annotations import Annotations


class Rows(Protocol):
    """The part of `Split` that transforms need; `in_memory.py` has the same for images in memory."""

    @property
    def name(self) -> str:
        """For messages, with `location`."""
        ...

    @property
    def location(self) -> str: ...

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of raw images; None for encoded ones, whose sizes vary."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [n]."""
        ...

    def __len__(self) -> int: ...

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Raw images as a batch of its own, [B, C, H, W]."""
        ...

    def image(self, row: int) -> Tensor:
        """One image, uint8 [C, H, W]."""
        ...

    def annotations(self, row: int) -> Annotations:
        """The objects of one image."""
        ...
