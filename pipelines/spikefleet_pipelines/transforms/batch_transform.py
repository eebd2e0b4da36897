"""What a transform is for the loader: rows become images and targets, which may have to travel between processes."""

from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Targets: TypeAlias = Tensor | tuple[Any, ...]
"""One target for each image: rows of a tensor, or a tuple (of `Target` for detection).

What is in a tuple has `to(device, non_blocking=...)` as tensors have it, so that a batch can be moved.
"""

PackedT = TypeVar("PackedT")
TargetsT_co = TypeVar("TargetsT_co", bound=Targets, covariant=True)


class BatchTransform(Protocol[PackedT, TargetsT_co]):
    """Loads and transforms batches of one split.

    It is pickled into loader processes and called there; its targets come back to the training process packed, and are
    unpacked there. A tensor that travels takes a file descriptor, so targets of many small tensors are packed as numpy
    arrays.
    """

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, PackedT]:
        """Load rows.

        Args:
            rows: positions in the split, [B].

        Returns:
            Images float32 [B, C, H, W], normalised, and the packed targets.

        Raises:
            ValueError: a row cannot be loaded; the sentence reaches the user as it is.
        """
        ...

    def unpack(self, packed: PackedT) -> TargetsT_co:
        """The targets of a batch, in the training process."""
        ...
