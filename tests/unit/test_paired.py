"""Tests on the images that only one of two networks gets right: level, power, intervals, and classes that fall."""

import numpy as np
import pytest
from scipy.stats import binomtest

from spikefleet.gates.paired import ALPHA, PairedCounts, holm, worse_classes


def drawn(images: int, gained: float, lost: float, times: int, seed: int = 0) -> list[PairedCounts]:
    """Counts of networks of which the candidate alone is right with probability `gained`, the champion with `lost`."""
    shares = [gained, lost, 1 - gained - lost]
    counts = np.random.default_rng(seed).multinomial(images, shares, times)
    return [PairedCounts(images, int(b), int(c)) for b, c, _ in counts]


def promoted(counts: list[PairedCounts]) -> float:
    return sum(one.p_better <= ALPHA for one in counts) / len(counts)


@pytest.mark.parametrize(("images", "differ"), [(143, 0.04), (360, 0.03), (10_000, 0.04)])
def test_an_equal_network_is_seldom_better(images: int, differ: float) -> None:
    """Fewer than 7 % pass; whatever is strictly better would be nearly every second one."""
    counts = drawn(images, differ / 2, differ / 2, 2_000)
    assert promoted(counts) < 0.07
    strictly = sum(one.gained > one.lost for one in counts) / len(counts)
    assert 0.35 < strictly < 0.5


def test_two_points_on_ten_thousand_images_are_seen() -> None:
    assert promoted(drawn(10_000, 0.03, 0.01, 500)) > 0.95
    assert promoted(drawn(10_000, 0.01, 0.03, 500)) == 0.0


@pytest.mark.parametrize("images", [360, 10_000])
def test_the_detectable_gain_is_found_four_times_in_five(images: int) -> None:
    typical = PairedCounts(images, round(0.02 * images), round(0.02 * images))
    half = typical.detectable_gain / 2
    found = promoted(drawn(images, 0.02 + half, 0.02 - half, 1_000))
    assert 0.65 < found < 0.95


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 2), (0, 7), (300, 250)])
def test_p_values_are_those_of_the_exact_binomial_test(gained: int, lost: int) -> None:
    counts = PairedCounts(1_000, gained, lost)
    for value, of in ((counts.p_better, gained), (counts.p_worse, lost)):
        expected = binomtest(of, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
        assert value == pytest.approx(expected)


def test_counts_come_from_pairs() -> None:
    candidate = np.array([True, True, False, False, True])
    champion = np.array([True, False, True, False, False])
    assert PairedCounts.of(candidate, champion) == PairedCounts(5, 2, 1)
    assert PairedCounts.of(candidate, champion).gain == pytest.approx(0.2)
    with pytest.raises(ValueError, match="found 5 and 4 images"):
        PairedCounts.of(candidate, champion[:4])


def test_the_interval_covers_the_gain_as_often_as_it_says() -> None:
    """Of 200 samples, near 95 % of intervals hold the true gain of one point."""
    covered = [
        low <= 0.01 <= high for low, high in (one.interval(resamples=500) for one in drawn(1_000, 0.03, 0.02, 200))
    ]
    assert 0.88 < np.mean(covered) <= 1.0


def test_holm_adjusts_as_its_paper_does() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_only_classes_that_fall_far_and_surely_are_named() -> None:
    """Class 0 loses 30 of 100, class 1 as few as chance, class 2 loses surely but fewer than allowed."""
    classes = np.repeat([0, 1, 2], [100, 100, 1_000])
    champion = np.ones(1_200, bool)
    candidate = champion.copy()
    candidate[:30] = False
    candidate[100:103] = False
    candidate[200:230] = False
    named = worse_classes(candidate, champion, classes, most=0.05)
    assert list(named) == [0]
    assert named[0] == PairedCounts(100, 0, 30)
    assert set(worse_classes(candidate, champion, classes, most=0.02)) == {0, 2}
    assert worse_classes(champion, candidate, classes, most=0.0) == {}
