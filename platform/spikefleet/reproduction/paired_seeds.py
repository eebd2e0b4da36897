"""Two settings trained with the same seeds: their difference, its interval, and the effect that so few seeds can show.

A seed fixes the initial weights and the order of the images, so differences are formed between trainings of one seed.
Differences are taken as normally distributed, as in Student's paired t-test; with 3 to 10 seeds no test without that
assumption can reach 5 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy import optimize, stats

from spikefleet.gates.paired import ALPHA

LEVEL = 0.95
"""Probability that an interval covers the difference."""

POWER = 0.8
"""Probability to show an effect of the size that `smallest_effect` returns."""

_Seed = TypeVar("_Seed", bound=Hashable)


@dataclass(frozen=True)
class PairedSeeds:
    """Results of two settings, paired by seed."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    """With the seeds of `first`, in the same order."""

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second) or not self.first:
            raise ValueError(
                f"found {len(self.first)} and {len(self.second)} results, expected as many of both, at least 1"
            )

    @classmethod
    def of(cls, first: Mapping[_Seed, float], second: Mapping[_Seed, float]) -> PairedSeeds | None:
        """Pairs results by seed; None without a common seed."""
        common = [seed for seed in first if seed in second]
        if not common:
            return None
        return cls(tuple(first[seed] for seed in common), tuple(second[seed] for seed in common))

    @property
    def seeds(self) -> int:
        """Number of pairs."""
        return len(self.first)

    @property
    def differences(self) -> tuple[float, ...]:
        """The first setting minus the second, by seed."""
        return tuple(one - other for one, other in zip(self.first, self.second, strict=True))

    @property
    def difference(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self.differences)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the differences; None with one seed, or where all differences are the same.

        Accuracies are multiples of one image, so two or three differences may agree by chance: that they do is no
        sign that there is no noise.
        """
        return _spread(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the difference; None where the deviation is not known."""
        return t_interval(self.differences)

    @property
    def p_value(self) -> float:
        """Two-sided p of Student's paired t-test; 1 where the deviation is not known."""
        deviation = self.deviation
        if deviation is None:
            return 1.0
        t = self.difference / (deviation / math.sqrt(self.seeds))
        return float(2 * stats.t.sf(abs(t), self.seeds - 1))

    @property
    def seed_deviation(self) -> float | None:
        """Standard deviation over the seeds of one setting, pooled over both; None where neither has one."""
        spreads = [_spread(values) for values in (self.first, self.second)]
        if all(one is None for one in spreads):
            return None
        return math.sqrt(statistics.fmean((one or 0.0) ** 2 for one in spreads))

    @property
    def effect_size(self) -> float | None:
        """The difference in units of the seeds' standard deviation; None where that is not known."""
        deviation = self.seed_deviation
        return None if deviation is None else self.difference / deviation

    def relative_to(self, paper: float | None) -> float | None:
        """Our difference over the paper's: 1 is the same effect, 0 none, below 0 the opposite; None without one."""
        return self.difference / paper if paper else None


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None with one value, or where rounding alone separates them."""
    if len(values) < 2:
        return None
    deviation = statistics.stdev(values)
    largest = max(abs(value) for value in values)
    return deviation if deviation > 1e-9 * max(largest, 1e-9) else None


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of a mean.

    Args:
        values: independent measurements.
        level: probability that it covers the mean.

    Returns:
        Its ends; None with fewer than two values, or if all are the same.
    """
    deviation = _spread(values)
    if deviation is None:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def power_of(effect: float, deviation: float, seeds: int, alpha: float = ALPHA) -> float:
    """Probability that a two-sided paired t-test shows a true difference.

    Args:
        effect: the true difference.
        deviation: standard deviation of the differences of pairs.
        seeds: number of pairs, at least 2.
        alpha: chance to show a difference where there is none.
    """
    _check_design(deviation, seeds)
    critical = float(stats.t.ppf(1 - alpha / 2, seeds - 1))
    shift = abs(effect) * math.sqrt(seeds) / deviation
    upper, lower = (float(stats.nct.sf(critical, seeds - 1, side)) for side in (shift, -shift))
    return upper + lower


def smallest_effect(deviation: float, seeds: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true difference that a two-sided paired t-test shows with a given probability.

    Args:
        deviation: standard deviation of the differences of pairs. Of two settings whose seeds deviate by s each, and
            independently, it is s * sqrt(2).
        seeds: number of pairs, at least 2.
        power: probability to show it.
        alpha: chance to show a difference where there is none.

    Raises:
        ValueError: fewer than two seeds, or a deviation that is not above 0.
    """
    _check_design(deviation, seeds)
    top = 1.0
    while power_of(top, 1.0, seeds, alpha) < power:
        top *= 2
    found = optimize.brentq(lambda effect: power_of(effect, 1.0, seeds, alpha) - power, 0.0, top, xtol=1e-9)
    return float(found) * deviation


def _check_design(deviation: float, seeds: int) -> None:
    if seeds < 2 or not deviation > 0:
        raise ValueError(f"found {seeds} seeds with deviation {deviation}, expected at least 2 seeds and more than 0")
