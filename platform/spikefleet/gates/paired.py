"""Two networks on the same images: is the candidate better, and how small a gain could these images show?

Of n images, b are right by the candidate alone ("gained") and c by the champion alone ("lost"). That both are right or
wrong says nothing about which is better, so the tests look at b and c (McNemar, Psychometrika 12, 1947; in its exact
form). A rule that promotes whatever is strictly better promotes nearly every second network that is equally good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
"""Chance to promote a network that is no better."""

_SEEN = 2.5
"""A gain of `_SEEN * sqrt(d / n)` is found about four times in five, d being the share of images that differ."""


@dataclass(frozen=True)
class PairedCounts:
    """On how many images the two networks differ."""

    images: int
    gained: int
    """Right by the candidate alone."""
    lost: int
    """Right by the champion alone."""

    @classmethod
    def of(cls, candidate: NDArray[np.bool_], champion: NDArray[np.bool_]) -> PairedCounts:
        """Counts from the correctness of each image, [n] each.

        Raises:
            ValueError: the two have different numbers of images, or none.
        """
        if candidate.shape != champion.shape or not len(candidate):
            raise ValueError(f"found {len(candidate)} and {len(champion)} images, expected as many of both, at least 1")
        return cls(len(candidate), int((candidate & ~champion).sum()), int((champion & ~candidate).sum()))

    @property
    def gain(self) -> float:
        """Difference in accuracy: candidate minus champion."""
        return (self.gained - self.lost) / self.images

    @property
    def p_better(self) -> float:
        """One-sided exact McNemar test of a gain: P(X >= gained), X ~ Binomial(gained + lost, 1/2)."""
        return _at_least(self.gained, self.gained + self.lost)

    @property
    def p_worse(self) -> float:
        """The same test that the candidate is worse."""
        return _at_least(self.lost, self.gained + self.lost)

    @property
    def detectable_gain(self) -> float:
        """The gain in accuracy that this many images can show, about four times in five."""
        different = max(self.gained + self.lost, 1)
        return _SEEN * math.sqrt(different) / self.images

    def interval(self, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
        """Paired bootstrap interval of the gain: the counts (gained, lost, rest) are multinomial.

        Args:
            level: probability that it covers the gain.
            resamples: number of resamples.
            seed: of the resamples.
        """
        shares = np.array([self.gained, self.lost, self.images - self.gained - self.lost]) / self.images
        drawn = np.random.default_rng(seed).multinomial(self.images, shares, resamples)
        low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / self.images, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def _at_least(successes: int, trials: int) -> float:
    """P(X >= successes) of a binomial distribution with probability 1/2, from its exact counts."""
    ways, total = math.comb(trials, successes), 0
    for count in range(successes, trials + 1):
        total += ways
        ways = ways * (trials - count) // (count + 1)
    return total / 2**trials


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979); each at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def worse_classes(
    candidate: NDArray[np.bool_],
    champion: NDArray[np.bool_],
    classes: NDArray[np.int64],
    most: float,
    alpha: float = ALPHA,
) -> dict[int, PairedCounts]:
    """The classes whose accuracy falls by more than `most`, where that is more than chance.

    Args:
        candidate: whether it is right, [n].
        champion: whether it is right, [n].
        classes: the true class of each image, [n].
        most: allowed drop in accuracy, in [0, 1].
        alpha: chance to name any class although none is worse, over all of them (Holm).

    Returns:
        Class and counts of each worse one.
    """
    present = [int(label) for label in np.unique(classes)]
    counts = {label: PairedCounts.of(candidate[classes == label], champion[classes == label]) for label in present}
    adjusted = dict(zip(present, holm([counts[label].p_worse for label in present]), strict=True))
    return {label: one for label, one in counts.items() if -one.gain > most and adjusted[label] <= alpha}
