"""Measures of drift between two samples, with what chance alone makes of each.

Two samples of the same images differ too, small ones most: a measure alarms where it is above its level and above what
only one of 1,000 pairs of samples without drift reaches.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Level = Literal["none", "moderate", "strong"]
"""Of an alarm."""

MODERATE = 0.1
STRONG = 0.25
"""Levels of a population stability index, as credit scoring has them; here of relative changes too."""

RARE = 0.001
"""Probability of a value above chance where there is no drift."""

_GROUPS = 10

_ANYTHING = 1e9
"""What chance makes of a mean over one image: any change."""

Counts = NDArray[np.int64]
"""Numbers of samples in bins or classes, [bins]."""


def level_of(value: float, chance: float) -> Level:
    """The alarm of a value that is above its level, and above what chance makes of it."""
    if not value > max(chance, 0.0) or value < MODERATE:
        return "none"
    return "strong" if value >= STRONG else "moderate"


def grouped(before: Counts, after: Counts) -> tuple[Counts, Counts]:
    """Merges bins of a histogram into about ten groups, each with a tenth of the samples before.

    A bin that alone has a tenth stays alone, so that what is always the same, such as a size, is seen to change.

    Returns:
        Counts of both in the groups.
    """
    target = max(1.0, before.sum() / _GROUPS)
    group, filled = 0, 0
    names: list[int] = []
    for count in before.tolist():
        if count >= target and (filled or (names and names[-1] == group)):
            group, filled = group + 1, 0
        names.append(group)
        filled += count
        if filled >= target:
            group, filled = group + 1, 0
    size = group + 1
    one, other = (np.bincount(names, counts, size).astype(np.int64) for counts in (before, after))
    return one, other


def stability_index(before: Counts, after: Counts) -> float:
    """Population stability index: the sum over groups of (q - p) ln(q / p), p and q being shares before and after.

    A group that is empty in one of both counts as half a sample there, so that the index is finite.
    """
    there = (before + after) > 0
    p, q = (np.maximum(counts[there], 0.5) / counts.sum() for counts in (before, after))
    return float(((q - p) * np.log(q / p)).sum())


def chance_of_index(before: Counts, after: Counts) -> float:
    """The stability index that chance alone exceeds once in 1,000: it is (1/n + 1/m) times a chi-square variable.

    Yurdakul and Naranjo, J. Risk Model Validation 2020. Degrees of freedom: groups with samples, minus one.
    """
    from scipy.special import chdtri

    freedom = int(((before + after) > 0).sum()) - 1
    sizes = 1 / int(before.sum()) + 1 / int(after.sum())
    return 0.0 if freedom < 1 else float(chdtri(freedom, RARE)) * sizes


def kolmogorov_smirnov(before: Counts, after: Counts) -> tuple[float, float]:
    """Largest distance of the two distribution functions at the edges of bins, and its asymptotic p-value."""
    from scipy.special import kolmogorov

    n, m = int(before.sum()), int(after.sum())
    distance = float(np.abs(before.cumsum() / n - after.cumsum() / m).max())
    return distance, float(kolmogorov(math.sqrt(n * m / (n + m)) * distance))


def chi_square(before: Counts, after: Counts) -> tuple[float, int, float]:
    """Pearson's test that both have the same shares: statistic, degrees of freedom and p-value."""
    from scipy.special import chdtrc

    observed = np.stack([before, after])[:, (before + after) > 0].astype(np.float64)
    expected = observed.sum(1, keepdims=True) * observed.sum(0) / observed.sum()
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), observed.shape[1] - 1
    return statistic, freedom, float(chdtrc(freedom, statistic)) if freedom else 1.0


def total_variation(before: Counts, after: Counts) -> float:
    """Half the sum of differences of shares: the part of the samples that would have to change their class."""
    return float(np.abs(before / before.sum() - after / after.sum()).sum() / 2)


def relative_change(before: float, after: float, least: float) -> float:
    """(after - before) / before; `before` counts as at least `least`, below which it is not worth a percentage."""
    return (after - before) / max(before, least)


def chance_of_change(
    stds: tuple[float, float], images: tuple[int, int], before: float, least: float, tries: int = 1
) -> float:
    """The relative change of a mean that chance alone exceeds once in 1,000, by Student's distribution.

    Args:
        stds: standard deviation over images, before and after.
        images: number of images of both.
        before: the mean before.
        least: as of `relative_change`.
        tries: of how many such changes the largest is taken.
    """
    from scipy.special import stdtrit

    if min(images) < 2:
        return _ANYTHING
    error = math.sqrt(sum(std**2 / number for std, number in zip(stds, images, strict=True)))
    return float(-stdtrit(min(images) - 1, RARE / 2 / tries)) * error / max(before, least)


def calibration_error(counts: Counts, confidence: NDArray[np.float64], right: Counts) -> float:
    """Expected calibration error: mean over answers of |accuracy - confidence| of their bin (Guo et al., ICML 2017).

    Args:
        counts: answers in each bin of confidence.
        confidence: sum of their confidence.
        right: how many of them are right.
    """
    return float(np.abs(right - confidence).sum() / counts.sum())


def chance_of_calibration(counts: Counts, confidence: NDArray[np.float64], right: Counts) -> float:
    """The calibration error of these answers that chance alone makes of a network without any, once in 1,000.

    In a bin of n answers with mean confidence c the accuracy has the standard deviation s = sqrt(c (1 - c) / n); the
    mean of its magnitude is s sqrt(2 / pi), and the variance s^2 (1 - 2 / pi).
    """
    from scipy.special import ndtri

    there = counts > 0
    mean = np.clip(confidence[there] / counts[there], 0.0, 1.0)
    share = counts[there] / counts.sum()
    variance = mean * (1 - mean) / counts[there]
    expected = (share * np.sqrt(variance)).sum() * math.sqrt(2 / math.pi)
    return float(expected - ndtri(RARE) * math.sqrt((share**2 * variance).sum() * (1 - 2 / math.pi)))
