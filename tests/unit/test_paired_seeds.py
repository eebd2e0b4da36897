"""Statistics of trainings over seeds, against scipy's own tests and against simulated trainings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from spikefleet.reproduction.paired_seeds import PairedSeeds, power_of, smallest_effect, t_interval

FIRST = (91.2, 90.8, 91.9, 92.3, 90.1)
SECOND = (90.4, 90.9, 90.2, 91.1, 89.7)


def test_the_paired_test_is_scipys() -> None:
    ours, theirs = PairedSeeds(FIRST, SECOND), stats.ttest_rel(FIRST, SECOND)
    assert ours.difference == pytest.approx(np.mean(FIRST) - np.mean(SECOND))
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    # Pairs matter: without them the same results show nothing.
    assert ours.p_value < 0.7 * stats.ttest_ind(FIRST, SECOND).pvalue
    assert PairedSeeds(SECOND, FIRST).difference == -ours.difference
    assert PairedSeeds(SECOND, FIRST).p_value == ours.p_value


def test_the_interval_of_one_mean_is_scipys() -> None:
    theirs = stats.ttest_1samp(FIRST, 0.0).confidence_interval(0.9)
    assert t_interval(FIRST, 0.9) == pytest.approx(tuple(theirs), rel=1e-9)


def test_effect_sizes_are_in_units_of_the_seeds_and_of_the_paper() -> None:
    ours = PairedSeeds(FIRST, SECOND)
    pooled = math.sqrt((np.var(FIRST, ddof=1) + np.var(SECOND, ddof=1)) / 2)
    assert ours.seed_deviation == pytest.approx(pooled)
    assert ours.effect_size == pytest.approx(ours.difference / pooled)
    assert ours.relative_to(1.6) == pytest.approx(0.5)
    assert ours.relative_to(-1.6) == pytest.approx(-0.5)
    assert ours.relative_to(None) is None
    assert ours.relative_to(0.0) is None


def test_only_common_seeds_are_paired() -> None:
    found = PairedSeeds.of({0: 3.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 1.0, 2: 8.0})
    assert found == PairedSeeds((3.0, 5.0), (1.0, 4.0))
    assert PairedSeeds.of({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="found 2 and 1 results"):
        PairedSeeds((1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="found 0 and 0 results"):
        PairedSeeds((), ())


@pytest.mark.parametrize(
    ("first", "second"), [((90.0,), (80.0,)), ((90.1, 90.2, 90.3), (80.1, 80.2, 80.3)), ((10.0, 10.0), (10.0, 10.0))]
)
def test_differences_without_a_spread_show_nothing(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    """Also where rounding in binary lets equal differences differ in the last digits."""
    ours = PairedSeeds(first, second)
    assert (ours.deviation, ours.interval, ours.p_value) == (None, None, 1.0)


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 3), (1.0, 5), (0.5, 10), (3.0, 3), (0.0, 4), (8.0, 5)])
def test_the_power_is_that_of_simulated_trainings(effect: float, seeds: int) -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(effect, 1.0, (20_000, seeds))
    found = (stats.ttest_1samp(differences, 0.0, axis=1).pvalue <= 0.05).mean()
    assert power_of(effect, 1.0, seeds) == pytest.approx(found, abs=0.012)
    assert power_of(-effect, 1.0, seeds) == power_of(effect, 1.0, seeds)
    assert power_of(2 * effect, 2.0, seeds) == pytest.approx(power_of(effect, 1.0, seeds))


def test_the_smallest_effect_is_shown_four_times_in_five() -> None:
    effects = {seeds: smallest_effect(1.0, seeds) for seeds in (2, 3, 5, 10, 100)}
    for seeds, effect in effects.items():
        assert power_of(effect, 1.0, seeds) == pytest.approx(0.8, abs=1e-6)
    assert effects[3] == pytest.approx(3.26, abs=0.01)
    assert effects[5] == pytest.approx(1.68, abs=0.01)
    assert effects[10] == pytest.approx(1.00, abs=0.01)
    assert effects[100] == pytest.approx((1.96 + 0.8416) / 10, rel=0.02)  # a normal distribution's, with many seeds
    assert smallest_effect(0.4, 5) == pytest.approx(0.4 * effects[5])
    assert smallest_effect(1.0, 5, power=0.5) < effects[5] < smallest_effect(1.0, 5, alpha=0.01)


@pytest.mark.parametrize(("deviation", "seeds"), [(1.0, 1), (0.0, 5), (-1.0, 5), (math.nan, 5)])
def test_a_design_without_spread_is_refused(deviation: float, seeds: int) -> None:
    with pytest.raises(ValueError, match="expected at least 2 seeds and more than 0"):
        smallest_effect(deviation, seeds)
