"""Twins: no network that cannot see order can tell them apart; and the constructions for which that is not true."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import uniform
from spikefleet_pipelines.events.moving_images import enlarge, shifted
from spikefleet_pipelines.events.pixel_model import DEFAULT, record
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.saccades import SIDE, Digits, Saccades
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit, flash
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions

Sample = tuple[EventArrays, int]
FLASH = 22_000


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits(None, DigitsOptions(), 0).splits


@pytest.fixture(scope="module")
def motion(digits: Digits) -> list[Sample]:
    return ApparentMotion(digits).samples("train", range(128))


@pytest.fixture(scope="module")
def first(digits: Digits) -> list[Sample]:
    return FirstDigit(digits).samples("test", range(40))


def frames(events: EventArrays, duration: int, slices: int) -> NDArray[np.int64]:
    """Counts of ON and OFF in slices of equal time, [T, 2, H, W]."""
    part = events.t * slices // duration
    place = ((part * 2 + events.p) * SIDE + events.y) * SIDE + events.x
    return np.bincount(place, minlength=slices * 2 * SIDE**2).reshape(slices, 2, SIDE, SIDE)


def unordered(slices: NDArray[np.int64]) -> list[bytes]:
    return sorted(part.tobytes() for part in slices)


@pytest.mark.parametrize(("kind", "good"), [(ApparentMotion, (1, 3, 6, 12)), (FirstDigit, (1, 2, 4, 8, 16))])
def test_twins_have_the_same_slices(
    kind: type[ApparentMotion | FirstDigit], good: tuple[int, ...], motion: list[Sample], first: list[Sample]
) -> None:
    """So a mean over slices of anything that is computed from a slice alone is right for at most one of two twins."""
    samples = motion if kind is ApparentMotion else first
    for (one, label), (other, twin) in zip(samples[::2], samples[1::2], strict=True):
        assert label != twin
        for slices in good:
            shown, mirrored = (frames(events, kind.duration_us, slices) for events in (one, other))
            assert unordered(shown) == unordered(mirrored)
            assert slices == 1 or not np.array_equal(shown, mirrored)
        # Negative control: with 5 slices some are in two recordings.
        assert unordered(frames(one, kind.duration_us, 5)) != unordered(frames(other, kind.duration_us, 5))


@pytest.mark.parametrize("kind", [ApparentMotion, FirstDigit])
def test_parts_of_twins_are_equal(
    kind: type[ApparentMotion | FirstDigit], motion: list[Sample], first: list[Sample]
) -> None:
    samples = motion if kind is ApparentMotion else first

    def parts(events: EventArrays) -> list[tuple[bytes, ...]]:
        found: list[tuple[bytes, ...]] = []
        for start in range(0, kind.duration_us, kind.part_us):
            part = events.select((events.t >= start) & (events.t < start + kind.part_us))
            found.append(((part.t - start).tobytes(), part.x.tobytes(), part.y.tobytes(), part.p.tobytes()))
        return found

    for (one, _), (other, _) in zip(samples[::2], samples[1::2], strict=True):
        assert (np.diff(one.t) >= 0).all()
        assert parts(one) == parts(other)[::-1] != parts(other)
    (one, _), (other, _) = samples[0], samples[3]
    assert set(parts(one)).isdisjoint(parts(other))


def test_first_digit_is_balanced(digits: Digits) -> None:
    task = FirstDigit(digits)
    assert task.counts == {"train": 2160, "val": 270, "test": 540}
    for split, count in task.counts.items():
        labels = digits[split][1]
        pairs = [task.parts(split, index) for index in range(count)]
        assert all(one == other[::-1] for one, other in zip(pairs[::2], pairs[1::2], strict=True))
        assert len(set(pairs)) == count
        classes = Counter((int(labels[one]), int(labels[other])) for one, other in pairs)
        assert set(classes.values()) == {count // 90}
        assert len(classes) == 90
        assert all(one != other for one, other in classes)


def test_first_digit_is_made_of_saccades(digits: Digits, first: list[Sample]) -> None:
    task = FirstDigit(digits)
    one, other = task.parts("test", 7)
    (events, label), (second, _) = Saccades(digits).samples("test", [one, other])
    sample = first[7]
    assert sample[1] == label == digits["test"][1][one]
    assert np.array_equal(sample[0].t, np.concatenate([events.t, second.t + 300_000]))
    assert np.array_equal(sample[0].x, np.concatenate([events.x, second.x]))


def shown_direction(events: EventArrays) -> int:
    """Direction from the middle of the ON events of the first flash to that of the last."""
    middles = []
    for start in (0, 120_000):
        chosen = (events.t >= start) & (events.t < start + FLASH) & (events.p == 1)
        middles.append((np.median(events.x[chosen]), np.median(events.y[chosen])))
    (x, y), (to_x, to_y) = middles
    return round(np.arctan2(to_y - y, to_x - x) / (np.pi / 4)) % 8


def test_the_label_is_the_direction(digits: Digits, motion: list[Sample]) -> None:
    task = ApparentMotion(digits)
    assert task.counts == {"train": 1920, "val": 240, "test": 480}
    assert set(Counter(label for _, label in motion).values()) == {16}
    assert np.mean([shown_direction(events) == label for events, label in motion]) > 0.97
    labels = [task.effects.mirrored(label) for _, label in motion]
    assert [task.class_names[task.effects.mirrored(k)] for k in (0, 1, 2, 7)] == [
        "left",
        "down left",
        "down",
        "up left",
    ]
    flipped = [EventArrays(e.t, np.uint16(SIDE - 1) - e.x, e.y, e.p) for e, _ in motion]
    assert np.mean([shown_direction(e) == label for e, label in zip(flipped, labels, strict=True)]) > 0.97


def test_alone_and_together_are_the_same(digits: Digits, motion: list[Sample], first: list[Sample]) -> None:
    for task, split, samples in ((ApparentMotion(digits), "train", motion), (FirstDigit(digits), "test", first)):
        events, label = task.sample(split, 9)
        assert label == samples[9][1]
        assert all(np.array_equal(getattr(events, name), getattr(samples[9][0], name)) for name in "txyp")
        other, _ = type(task)(digits, seed=1).sample(split, 9)
        assert not np.array_equal(events.t, other.t)
        with pytest.raises(IndexError, match="expected 0 to"):
            task.sample(split, task.counts[split])


class Shown(NamedTuple):
    """Recordings that move right (1) or left (-1)."""

    events: list[EventArrays]
    way: NDArray[np.int64]


def right(shown: Shown, answers: NDArray[np.float64] | NDArray[np.int64]) -> float:
    return float(np.mean(np.where(answers == 0, 0.5, np.sign(answers) == shown.way)))


def flashes(digits: Digits, apart: float, dark: tuple[int, int], count: int = 96, **age: NDArray[np.float64]) -> Shown:
    """Record three flashes from left to right, or from right to left, in one simulation.

    `apart` is their distance in pixels; `dark` the time without light after the first two, and after the last.
    """
    way = 1 - 2 * (np.arange(count) % 2)
    place = np.full((count, 2), 12.5)
    spots = []
    for k in (-1, 0, 1):
        moved = place + np.stack([np.zeros(count), k * apart * way], -1)
        spots.append(enlarge(digits["train"][0][:count, 0], np.full(count, 9.0), moved, (SIDE, SIDE)))
    period = FLASH + dark[0]

    def scene(time: int) -> NDArray[np.float32]:
        lit = [np.float32(0.35) * flash(time - k * period) * spot for k, spot in enumerate(spots)]
        return lit[0] + lit[1] + lit[2]

    return Shown(record(scene, 2 * period + FLASH + dark[1], DEFAULT, 5, np.arange(count), **age), way)


def outer_counts(events: EventArrays, polarity: int) -> tuple[int, int]:
    """Events of a polarity in the left and in the right third."""
    x = events.x[events.p == polarity]
    return int((x < SIDE / 3).sum()), int((x >= 2 * SIDE / 3).sum())


def fewer_off(shown: Shown) -> NDArray[np.float64]:
    """Where fewer OFF events are is the end: an answer from the sum over time."""
    return np.array([float(left - other) for left, other in (outer_counts(e, 0) for e in shown.events)])


def test_without_dark_at_the_end_the_sum_shows_the_order(digits: Digits) -> None:
    shown = flashes(digits, 10.5, (8_000, 0))
    assert right(shown, fewer_off(shown)) > 0.97
    # Negative control: the same rule on twins.
    parts = flashes(digits, 10.5, (38_000, 38_000))
    assert right(parts, fewer_off(parts)) < 0.75


def on_ahead_of_off(shown: Shown, duration: int, slices: int) -> NDArray[np.int64]:
    """Sum over slices, in whatever order, of how far ON is to the right of OFF, over all pairs of events of a slice."""
    answers = np.zeros(len(shown.way), np.int64)
    for number, events in enumerate(shown.events):
        counts = frames(events, duration, slices).sum(2)  # [T, 2, W]
        number_of, place = counts.sum(-1), (counts * np.arange(SIDE)).sum(-1)
        answers[number] = (place[:, 1] * number_of[:, 0] - place[:, 0] * number_of[:, 1]).sum()
    return answers


def test_flashes_that_share_slices_need_no_memory(digits: Digits) -> None:
    """The tail of a flash and the start of the next one are in a slice, which therefore has a direction."""
    shown = flashes(digits, 5.0, (0, 38_000))
    assert right(shown, on_ahead_of_off(shown, 104_000, 6)) > 0.9
    assert right(shown, on_ahead_of_off(shown, 104_000, 1)) < 0.75


def test_twins_give_these_rules_nothing(motion: list[Sample]) -> None:
    horizontal = [(events, label) for events, label in motion if label in (0, 4)]
    shown = Shown([e for e, _ in horizontal], np.array([1 if label == 0 else -1 for _, label in horizontal]))
    assert right(shown, fewer_off(shown)) == 0.5
    assert right(shown, on_ahead_of_off(shown, 180_000, 1)) == 0.5
    assert right(shown, on_ahead_of_off(shown, 180_000, 6)) == 0.5


def test_uniform_ages_with_noise_show_the_order(digits: Digits) -> None:
    """Noise resets pixels whose ages are larger than what noise leaves them, so that later flashes get fewer ON."""
    count = 320
    uniforms = uniform(3, 0, np.arange(count)[:, None], np.arange(SIDE**2)).reshape(count, SIDE, SIDE)

    def late_to_early(**age: NDArray[np.float64]) -> float:
        shown = flashes(digits, 10.5, (38_000, 38_000), count, **age)
        t, on = (np.concatenate([getattr(events, name) for events in shown.events]) for name in "tp")
        early, late = (((t >= start) & (t < start + FLASH) & (on == 1)).sum() for start in (0, 120_000))
        return float(late / early)

    assert late_to_early(start_age_s=uniforms / DEFAULT.leak_hz) < 0.98
    assert late_to_early() == pytest.approx(1, abs=0.015)


def test_a_gliding_digit_shows_its_direction_in_the_sum(digits: Digits) -> None:
    """Half of the digits are darker than the ground, so that polarities cancel; the first one still has more events."""
    count = 96
    way, bright = 1 - 2 * (np.arange(count) % 2), np.arange(count) // 2 % 2
    room = np.full((count, 2), 12.0 + 11.0)
    large = enlarge(digits["train"][0][:count, 0], np.full(count, 12.0), room, (SIDE + 24, SIDE + 24))
    ground = (np.sqrt(0.2) - 0.2) / 0.8  # its logarithm is half way between black and white

    def scene(time: int) -> NDArray[np.float32]:
        moved = [shifted(large[way == w], 12, (0, w * (time / 18_000 - 5)), (SIDE, SIDE)) for w in (1, -1)]
        seen = np.empty((count, SIDE, SIDE), np.float32)
        seen[way == 1], seen[way == -1] = moved
        light = np.where(bright[:, None, None] == 1, 1, 0)
        return (ground + seen * (light - ground)).astype(np.float32)

    shown = Shown(record(scene, 180_000, DEFAULT, 5, np.arange(count)), way)
    ahead = on_ahead_of_off(shown, 180_000, 1)
    assert right(shown, ahead) < 0.65  # polarities cancel
    more_on = np.sign([float(events.p.mean()) - 0.5 for events in shown.events])
    assert right(shown, ahead * more_on) > 0.85


def test_a_second_digit_in_one_simulation_is_another_one(digits: Digits) -> None:
    """What a sensor has seen stays in its references: the order of two digits changes the events of both."""
    flashed = enlarge(digits["train"][0][:2, 0], np.full(2, 22.0), np.full((2, 2), 6.0), (SIDE, SIDE))
    fresh = record(lambda time: flashed[1:], 60_000, DEFAULT, 0, np.arange(1))[0]
    both = record(lambda time: flashed[[int(time > 60_000)]], 120_000, DEFAULT, 0, np.arange(1))[0]
    assert (both.t >= 60_000).sum() > 3 * len(fresh)
