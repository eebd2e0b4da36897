"""Digits before the simulated camera: the events are those of the labels and of the boxes."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from spikefleet_pipelines.events.augmentation import mirror_boxes
from spikefleet_pipelines.events.moving_images import along, enlarge, shifted
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.saccade_scenes import BoxFrame, SaccadeScenes
from spikefleet_pipelines.events.saccades import Digits, Saccades
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits(None, DigitsOptions(), 0).splits


@pytest.fixture(scope="module")
def saccades(digits: Digits) -> list[tuple[EventArrays, int]]:
    return Saccades(digits).samples("train", range(320))


@pytest.fixture(scope="module")
def scenes(digits: Digits) -> list[tuple[EventArrays, list[BoxFrame]]]:
    return SaccadeScenes(digits).samples("train", range(24))


def equal(one: EventArrays, other: EventArrays) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in "txyp")


def test_saccades_are_all_digits(digits: Digits, saccades: list[tuple[EventArrays, int]]) -> None:
    task = Saccades(digits)
    assert sum(task.counts.values()) == 1797
    assert task.counts == {split: len(labels) for split, (_, labels) in digits.items()}
    assert [label for _, label in saccades] == digits["train"][1][:320].tolist()
    counts = np.array([len(events) for events, _ in saccades])
    assert 3500 < counts.mean() < 4200
    assert 2500 < counts.min() < counts.max() < 5500
    assert np.concatenate([events.p for events, _ in saccades]).mean() == pytest.approx(0.52, abs=0.02)
    every = np.concatenate([events.t for events, _ in saccades])
    thirds = np.bincount(every // 100_000) / len(every)
    assert thirds == pytest.approx([1 / 3] * 3, abs=0.05)  # three saccades


def test_a_sample_is_a_function_of_its_numbers(
    digits: Digits,
    saccades: list[tuple[EventArrays, int]],
    scenes: list[tuple[EventArrays, list[BoxFrame]]],
) -> None:
    assert equal(Saccades(digits).sample("train", 17)[0], saccades[17][0])
    assert not equal(Saccades(digits, seed=1).sample("train", 17)[0], saccades[17][0])
    events, frames = SaccadeScenes(digits).sample("train", 5)
    assert equal(events, scenes[5][0])
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(frames, scenes[5][1], strict=True))
    for task in (Saccades(digits), SaccadeScenes(digits)):
        with pytest.raises(IndexError, match=r"sample -1: expected 0 to"):
            task.samples("train", [0, -1])


def test_samples_stay_what_they_are(digits: Digits) -> None:
    """Stores that were made before must be made again, bit for bit."""
    tasks = Saccades(digits), FirstDigit(digits), ApparentMotion(digits), SaccadeScenes(digits)
    found = [(len(events), int(events.t.sum())) for events, _ in (task.sample("test", 1) for task in tasks)]
    assert found == [(3727, 573241977), (7833, 2566540325), (486, 37581274), (3870, 400406052)]


def test_the_digit_can_be_read_from_the_sum(saccades: list[tuple[EventArrays, int]]) -> None:
    """Labels go with events; and the set does not need time."""
    sums = np.array([np.bincount(e.y.astype(int) // 2 * 17 + e.x // 2, minlength=289) for e, _ in saccades])
    labels = np.array([label for _, label in saccades])
    model = LogisticRegression(max_iter=1000, tol=1e-2).fit(np.sqrt(sums[:240]), labels[:240])
    assert model.score(np.sqrt(sums[240:]), labels[240:]) > 0.7
    assert model.score(np.sqrt(sums[240:]), np.roll(labels[240:], 1)) < 0.3


def density(events: EventArrays, frame: BoxFrame, boxes: NDArray[np.float64]) -> tuple[float, float]:
    """Events per pixel around the time of a frame, inside of its boxes and outside."""
    near = events.select(abs(events.t - frame.t) < 15_000)
    image = np.zeros((96, 96))
    np.add.at(image, (near.y, near.x), 1)
    inside = np.zeros((96, 96), bool)
    for x, y, width, height in boxes.round().astype(int).tolist():
        inside[max(y, 0) : y + height, max(x, 0) : x + width] = True
    return float(image[inside].mean()), float(image[~inside].mean())


def test_boxes_are_where_the_events_are(scenes: list[tuple[EventArrays, list[BoxFrame]]]) -> None:
    found, mirrored = [], []
    for events, frames in scenes:
        for frame in frames:
            found.append(density(events, frame, frame.boxes))
            mirrored.append(density(events, frame, mirror_boxes(frame.boxes, (96, 96))))
    inside, outside = np.mean(found, axis=0)
    assert inside > 8 * outside
    assert np.mean(mirrored, axis=0)[0] < 0.6 * inside


def test_boxes_are_tight(scenes: list[tuple[EventArrays, list[BoxFrame]]]) -> None:
    """The outermost rows and columns of a box have events, those three pixels further out have only noise."""
    rims: list[float] = []
    surroundings: list[float] = []
    for events, frames in scenes:
        near = events.select(abs(events.t - frames[1].t) < 10_000)
        image = np.zeros((106, 106))
        np.add.at(image, (near.y + 5, near.x + 5), 1)
        for x, y, width, height in frames[1].boxes.round().astype(int).tolist():
            for out, found in ((0, rims), (3, surroundings)):
                top, left, bottom, right = y + 5 - out, x + 5 - out, y + 4 + height + out, x + 4 + width + out
                inner = slice(x + 5, x + 5 + width), slice(y + 5, y + 5 + height)
                found += [image[row, inner[0]].mean() for row in (top, bottom)]
                found += [image[inner[1], column].mean() for column in (left, right)]
    assert np.mean(rims) > 6 * np.mean(surroundings)


def test_scenes_have_frames_over_time(digits: Digits, scenes: list[tuple[EventArrays, list[BoxFrame]]]) -> None:
    numbers, sides, speeds = [], [], []
    for events, frames in scenes:
        assert [frame.t for frame in frames] == [50_000, 100_000, 150_000, 200_000]
        assert 0 <= events.t.min() <= events.t.max() < 200_000
        numbers.append(len(frames[0].labels))
        for frame in frames:
            assert np.array_equal(frame.labels, frames[0].labels)
            assert frame.boxes.shape == (len(frame.labels), 4)
            assert (frame.boxes[:, :2] >= -2).all()
            assert (frame.boxes[:, :2] + frame.boxes[:, 2:] <= 98).all()
        ways = np.diff([frame.boxes[:, :2] for frame in frames], axis=0)
        speeds += (np.hypot(ways[..., 0], ways[..., 1]) / 0.05).ravel().tolist()
        sides += frames[0].boxes[:, 3].tolist()
    assert set(numbers) == {1, 2, 3}
    assert 19.9 < min(speeds) < 30 < 60 < max(speeds) < 70.1
    assert 10 < min(sides) < 16 < 24 < max(sides) <= 36


def test_enlarged_digits_keep_their_place_and_light(digits: Digits) -> None:
    image = digits["train"][0][:1, 0]
    large = enlarge(image, np.array([32.0]), np.array([[10.0, 20.0]]), (64, 64))[0]
    light = large.sum() / 16
    assert light == pytest.approx(image.sum() / 255, rel=0.03)
    middle = [(large.sum(1 - axis) * (np.arange(64) + 0.5)).sum() / large.sum() for axis in (0, 1)]
    small = image[0] / 255
    expected = [4 * (small.sum(1 - axis) * (np.arange(8) + 0.5)).sum() / small.sum() for axis in (0, 1)]
    assert middle == pytest.approx([10 + expected[0], 20 + expected[1]], abs=0.2)


def test_shifts_move_by_parts_of_a_pixel() -> None:
    ramp = np.add.outer(np.arange(20.0), 3 * np.arange(20.0)).astype(np.float32)[None]
    assert np.array_equal(shifted(ramp, 4, (0, 0), (12, 12)), ramp[:, 4:16, 4:16])
    assert np.array_equal(shifted(ramp, 4, (3, -4), (12, 12)), ramp[:, 1:13, 8:20])
    assert np.allclose(shifted(ramp, 4, (0.25, -1.5), (12, 12)), ramp[:, 4:16, 4:16] - 0.25 + 4.5)
    corners = np.array([(0.0, 0.0), (4.0, 2.0), (4.0, 0.0)])
    assert [along(corners, part) for part in (0, 0.25, 0.5, 0.75, 1)] == [(0, 0), (2, 1), (4, 2), (4, 1), (4, 0)]
