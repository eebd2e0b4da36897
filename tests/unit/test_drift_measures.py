"""Measures of drift against values computed by hand and by scipy, and how often chance alone alarms."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, ks_2samp

from spikefleet.certificates.drift_reference import CALIBRATION_BINS, EDGES, Calibration, Distribution, Spread
from spikefleet.retraining.measures import (
    calibration_error,
    chance_of_calibration,
    chance_of_change,
    chance_of_index,
    chi_square,
    grouped,
    kolmogorov_smirnov,
    level_of,
    relative_change,
    stability_index,
    total_variation,
)

Counts = NDArray[np.int64]


def counts(*values: int) -> Counts:
    return np.array(values, np.int64)


def arrays(calibration: Calibration) -> tuple[Counts, NDArray[np.float64], Counts]:
    return counts(*calibration.counts), np.array(calibration.confidence), counts(*calibration.right)


def test_the_stability_index_by_hand() -> None:
    before, after = counts(50, 30, 20), counts(20, 30, 50)
    expected = -0.3 * math.log(0.2 / 0.5) + 0.0 + 0.3 * math.log(0.5 / 0.2)
    assert stability_index(before, after) == pytest.approx(expected)
    assert stability_index(after, before) == pytest.approx(expected), "it is symmetric"
    assert stability_index(before, 10 * before) == 0.0
    gone = (0.005 - 0.5) * math.log(0.005 / 0.5) + (1.0 - 0.5) * math.log(2)
    assert stability_index(counts(50, 50), counts(0, 100)) == pytest.approx(gone), "none is half a sample"
    assert stability_index(counts(7, 0, 0), counts(0 + 3, 0, 0)) == 0.0, "what nobody has is no group"


@pytest.mark.parametrize("after", [(10, 20, 30, 0), (15, 15, 30, 0), (40, 1, 0, 9)])
def test_the_chi_square_test_is_that_of_scipy(after: tuple[int, ...]) -> None:
    before, now = counts(20, 40, 60, 0), counts(*after)
    there = (before + now) > 0
    expected = chi2_contingency(np.stack([before, now])[:, there], correction=False)
    statistic, freedom, p = chi_square(before, now)
    assert (statistic, freedom, p) == pytest.approx((expected.statistic, expected.dof, expected.pvalue))


def test_the_chi_square_test_by_hand() -> None:
    statistic, freedom, _ = chi_square(counts(30, 10), counts(10, 30))
    assert statistic == pytest.approx(4 * 10**2 / 20)
    assert freedom == 1
    assert chi_square(counts(30, 0), counts(10, 0)) == (0.0, 0, 1.0)


def test_the_total_variation_by_hand() -> None:
    assert total_variation(counts(5, 5), counts(5, 5)) == 0.0
    assert total_variation(counts(50, 30, 20), counts(20, 30, 50)) == pytest.approx(0.3)
    assert total_variation(counts(5, 0), counts(0, 9)) == 1.0


@pytest.mark.parametrize(("n", "m", "shift"), [(1000, 1000, 0.0), (1000, 300, 0.05), (400, 900, 0.3)])
def test_kolmogorov_smirnov_is_that_of_scipy(n: int, m: int, shift: float) -> None:
    generator = np.random.default_rng(0)
    before, after = (np.clip(generator.normal(0.5 + by, 0.1, size), 0, 1) for by, size in ((0.0, n), (shift, m)))
    edges = EDGES["brightness"]
    bins = [np.searchsorted(edges[1:-1], values, side="right") for values in (before, after)]
    expected = ks_2samp(*bins, method="asymp")
    distance, p = kolmogorov_smirnov(
        *(np.array(Distribution.of("brightness", values).counts) for values in (before, after))
    )
    assert distance == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, abs=0.03)


def test_groups_hold_a_tenth_each_and_leave_a_common_value_alone() -> None:
    even = np.ones(100, np.int64)
    before, after = grouped(even, 2 * even)
    assert before[:10].tolist() == [10] * 10
    assert after.sum() == 200
    peak = np.zeros(112, np.int64)
    peak[24] = 500  # all images are 8 pixels wide
    for place in (10, 23, 25, 90):
        moved = np.zeros(112, np.int64)
        moved[place] = 500
        assert stability_index(*grouped(peak, moved)) > 5, f"a size of bin {place} is another"
    assert stability_index(*grouped(peak, 2 * peak)) == 0.0


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (1000, 100), (1000, 20), (50, 50), (2, 3)])
def test_samples_without_drift_seldom_alarm(n: int, m: int) -> None:
    """Small samples exceed a level of 0.1 often; chance is what keeps them from an alarm."""
    generator = np.random.default_rng(0)
    bare = alarms = 0
    for _ in range(400):
        values = [np.clip(generator.normal(0.4, 0.1, size), 0, 1) for size in (n, m)]
        pair = grouped(*(np.array(Distribution.of("brightness", one).counts) for one in values))
        index = stability_index(*pair)
        bare += level_of(index, 0.0) != "none"
        alarms += level_of(index, chance_of_index(*pair)) != "none"
    assert alarms <= 4
    if min(n, m) <= 100:
        assert bare > 10


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (1000, 100)])
def test_planted_shifts_alarm(n: int, m: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = [np.clip(generator.normal(mean, 0.1, size), 0, 1) for mean, size in ((0.4, n), (0.5, m))]
        pair = grouped(*(np.array(Distribution.of("brightness", one).counts) for one in values))
        assert level_of(stability_index(*pair), chance_of_index(*pair)) == "strong"


@pytest.mark.parametrize("images", [2, 5, 30, 128])
def test_means_without_drift_seldom_alarm(images: int) -> None:
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        layers = generator.gamma(2, 0.05, (20, 2, images))
        spreads = [[Spread.of(side) for side in layer] for layer in layers]
        alarms += any(
            level_of(
                abs(relative_change(one.mean, other.mean, 1e-3)),
                chance_of_change((one.std, other.std), (images, images), one.mean, 1e-3, tries=20),
            )
            != "none"
            for one, other in spreads
        )
    assert alarms <= 6
    assert level_of(9.0, chance_of_change((0.0, 0.0), (1, 500), 0.1, 1e-3)) == "none", "of one image"


def test_changes_by_hand() -> None:
    assert relative_change(0.2, 0.3, 1e-3) == pytest.approx(0.5)
    assert relative_change(0.0, 0.01, 1e-3) == pytest.approx(10.0), "of a silent layer"
    error = math.sqrt(0.04**2 / 100 + 0.03**2 / 400)
    quantile = 3.3915  # of Student's distribution with 99 degrees of freedom: 0.9995
    assert chance_of_change((0.04, 0.03), (100, 400), 0.2, 1e-3) == pytest.approx(quantile * error / 0.2, rel=1e-4)


def test_the_calibration_error_by_hand() -> None:
    answers = [(0.95, True), (0.95, False), (0.55, True), (0.55, True), (1.0, True)]
    bins = Calibration.of(answers)
    assert sum(bins.counts) == 5
    assert bins.counts[CALIBRATION_BINS - 1] == 3, "a confidence of 1 is in the last bin"
    expected = (abs(2 - 2.9) + abs(2 - 1.1)) / 5
    assert calibration_error(*arrays(bins)) == pytest.approx(expected)
    assert calibration_error(*arrays(Calibration.of([(1.0, True)] * 7))) == 0.0
    assert Calibration.of([(math.nan, False)]).counts[0] == 1, "a network that diverges is sure of nothing"


@pytest.mark.parametrize("answers", [20, 128, 1000])
def test_a_calibrated_network_seldom_exceeds_chance_and_an_overconfident_one_does(answers: int) -> None:
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(300):
        confidence = generator.uniform(0.3, 1.0, answers)
        right = generator.random(answers) < confidence
        bins = arrays(Calibration.of(zip(confidence.tolist(), right.tolist(), strict=True)))
        above += calibration_error(*bins) > chance_of_calibration(*bins)
    assert above <= 6
    sure = arrays(Calibration.of([(0.97, number % 2 == 0) for number in range(answers)]))
    assert calibration_error(*sure) > chance_of_calibration(*sure)


@pytest.mark.parametrize(
    ("value", "chance", "level"),
    [
        (0.0, 0.0, "none"),
        (0.099, 0.0, "none"),
        (0.1, 0.05, "moderate"),
        (0.249, 0.05, "moderate"),
        (0.25, 0.05, "strong"),
        (0.3, 0.31, "none"),
        (math.nan, 0.0, "none"),
    ],
)
def test_levels(value: float, chance: float, level: str) -> None:
    assert level_of(value, chance) == level
