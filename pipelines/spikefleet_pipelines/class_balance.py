"""Balanced sampling: each epoch has as many samples of each class, as a pure function of (seed, epoch)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, random_bits


@dataclass(frozen=True)
class ClassBalance:
    """The samples of balanced epochs.

    The samples of a class stand in a sequence of permutations, one behind the other; an epoch takes the next `quota` of
    each class. So after any number of epochs the samples of a class were seen equally often, but for one time.

    Attributes:
        labels: class of each sample to train on, [n].
        seed: of the permutations.
    """

    labels: NDArray[np.int64]
    seed: int

    @property
    def classes(self) -> NDArray[np.int64]:
        """The classes that there are, ascending."""
        return np.unique(self.labels)

    @property
    def quota(self) -> int:
        """Samples of each class in an epoch: the samples by the number of classes, rounded down, at least 1."""
        return max(1, len(self.labels) // len(self.classes))

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.quota * len(self.classes)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Choose the samples of an epoch, [samples]: positions in `labels`, class by class."""
        return np.concatenate([self._of_class(int(label), epoch) for label in self.classes])

    def coverage(self, names: tuple[str, ...]) -> str:
        """Say how much of each class an epoch has.

        Args:
            names: of the classes.
        """
        counts = {int(label): int((self.labels == label).sum()) for label in self.classes}
        rare, common = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        return (
            f"balanced sampling: an epoch has {self.quota:,} samples of each of {len(counts):,} classes, "
            f"{self.samples:,} of {len(self.labels):,} in all; those of {names[rare]} ({counts[rare]:,}) "
            f"{self.quota / counts[rare]:.3g} times, of {names[common]} ({counts[common]:,}) "
            f"{self.quota / counts[common]:.3g} times"
        )

    def _of_class(self, label: int, epoch: int) -> NDArray[np.int64]:
        members = np.flatnonzero(self.labels == label)
        first, size = epoch * self.quota, len(members)
        passes = range(first // size, (first + self.quota - 1) // size + 1)
        sequence = np.concatenate([members[self._order(members, one)] for one in passes])
        start = first - passes[0] * size
        return sequence[start : start + self.quota]

    def _order(self, members: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        return np.argsort(random_bits(self.seed, number, members, Draw.BALANCE), kind="stable")
