"""Augmentations of events: what each keeps, what each changes, and that a sample's numbers decide everything."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events import augmentation as aug
from spikefleet_pipelines.events.augmentation import Sample, augment
from spikefleet_pipelines.events.augmentation_config import EventAugmentation
from spikefleet_pipelines.events.label_effects import LabelEffects
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.saccade_scenes import SaccadeScenes
from spikefleet_pipelines.events.saccades import Saccades
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit

SENSOR: Sensor = (20, 30)
DURATION = 1000
FREE = LabelEffects(mirror="free", reversal="free")
EVERYTHING = EventAugmentation(
    horizontal_flip=0.5,
    polarity_swap=0.5,
    time_reversal=0.5,
    shift=0.1,
    time_crop=0.8,
    time_jitter_us=20.0,
    event_drop=True,
)


def made(count: int, seed: int = 0) -> EventArrays:
    draw = np.random.default_rng(seed)
    return EventArrays(
        np.sort(draw.integers(0, DURATION, count)),
        draw.integers(0, SENSOR[1], count).astype(np.uint16),
        draw.integers(0, SENSOR[0], count).astype(np.uint16),
        draw.integers(0, 2, count).astype(np.uint8),
    )


some_events = st.builds(made, st.integers(0, 60), st.integers(0, 1000))
samples = st.builds(Sample, st.integers(0, 3), st.integers(0, 5), st.integers(0, 1 << 40))


def rows(events: EventArrays) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True))


@given(some_events, samples)
@settings(max_examples=60, deadline=None)
def test_results_are_events_of_the_sensor(events: EventArrays, sample: Sample) -> None:
    before = rows(events)
    result, label = augment(events, 3, (SENSOR, DURATION), EVERYTHING, FREE, sample)
    assert label == 3
    assert rows(events) == before  # the argument is left as it was
    assert [getattr(result, name).dtype for name in "txyp"] == [np.int64, np.uint16, np.uint16, np.uint8]
    assert len({len(getattr(result, name)) for name in "txyp"}) == 1
    assert len(result) <= len(events)
    assert all(0 <= t < DURATION and 0 <= x < 30 and 0 <= y < 20 and p in (0, 1) for t, x, y, p in rows(result))
    assert (np.diff(result.t) >= 0).all()
    again, _ = augment(events, 3, (SENSOR, DURATION), EVERYTHING, FREE, sample)
    assert rows(again) == rows(result)


@given(some_events)
@settings(max_examples=30, deadline=None)
def test_what_undoes_itself(events: EventArrays) -> None:
    for once in (
        lambda e: aug.mirror(e, SENSOR),
        aug.swap_polarity,
        lambda e: aug.reverse_time(e, DURATION),
    ):
        assert rows(once(once(events))) == rows(events)
        assert len(events) == 0 or rows(once(events)) != rows(events)
    moved = aug.shift(events, SENSOR, (3, -7), "wrap")
    assert rows(aug.shift(moved, SENSOR, (-3, 7), "wrap")) == rows(events)


def test_each_does_what_it_says() -> None:
    t, x, y, p = np.array([[0, 10, 999], [0, 5, 29], [0, 6, 19], [1, 0, 1]])
    events = EventArrays(t, x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8))
    assert rows(aug.mirror(events, SENSOR)) == [(0, 29, 0, 1), (10, 24, 6, 0), (999, 0, 19, 1)]
    assert rows(aug.swap_polarity(events)) == [(0, 0, 0, 0), (10, 5, 6, 1), (999, 29, 19, 0)]
    assert rows(aug.reverse_time(events, DURATION)) == [(0, 29, 19, 0), (989, 5, 6, 1), (999, 0, 0, 0)]
    assert rows(aug.shift(events, SENSOR, (-1, 2), "wrap")) == [(0, 2, 19, 1), (10, 7, 5, 0), (999, 1, 18, 1)]
    assert rows(aug.shift(events, SENSOR, (-1, 2), "drop")) == [(10, 7, 5, 0)]
    assert rows(aug.crop_time(events, 10, 999)) == [(0, 5, 6, 0)]
    assert rows(aug.drop_interval(events, 5, 6)) == [(0, 0, 0, 1), (999, 29, 19, 1)]
    assert rows(aug.drop_area(events, (6, 5, 1, 1))) == [(0, 0, 0, 1), (999, 29, 19, 1)]
    assert rows(aug.drop_area(events, (5, 6, 10, 10))) == rows(events)
    boxes = np.array([[2.0, 3.0, 5.0, 4.0]])
    assert aug.mirror_boxes(boxes, SENSOR).tolist() == [[23.0, 3.0, 5.0, 4.0]]
    assert aug.mirror_boxes(aug.mirror_boxes(boxes, SENSOR), SENSOR).tolist() == boxes.tolist()


def test_boxes_go_with_events() -> None:
    """An event is in the box after a flip where and only where it was before."""
    events = made(400)
    boxes = np.array([[4.0, 3.0, 9.0, 8.0]])

    def inside(events: EventArrays, boxes: np.ndarray) -> list[bool]:
        (x, y, width, height), places = boxes[0], zip(events.x + 0.5, events.y + 0.5, strict=True)
        return [x < px < x + width and y < py < y + height for px, py in places]

    before = inside(events, boxes)
    assert 10 < sum(before) < 200
    assert inside(aug.mirror(events, SENSOR), aug.mirror_boxes(boxes, SENSOR)) == before
    assert inside(aug.mirror(events, SENSOR), boxes) != before


def test_jitter_is_gaussian_loses_nothing_and_sorts() -> None:
    events = EventArrays(np.full(20_000, 5000), *(np.zeros(20_000, kind) for kind in (np.uint16, np.uint16, np.uint8)))
    t = aug.jitter_time(events, 100.0, 10_000, Sample(0, 0, 0)).t
    assert (len(t), t.mean(), t.std()) == (20_000, pytest.approx(5000, abs=3), pytest.approx(100, rel=0.03))
    assert np.mean(abs(t - 5000) < 100) == pytest.approx(0.683, abs=0.015)
    assert (np.diff(t) >= 0).all()
    wild = aug.jitter_time(made(500), 2000.0, DURATION, Sample(0, 0, 0))
    assert 0 <= wild.t.min() < wild.t.max() < DURATION
    assert Counter((x, y, p) for _, x, y, p in rows(wild)) == Counter((x, y, p) for _, x, y, p in rows(made(500)))


def test_event_drop_has_four_kinds_of_a_quarter() -> None:
    events = made(2000)
    kinds: Counter[str] = Counter()
    shares = []
    for number in range(600):
        kept = aug.drop_events(events, (SENSOR, DURATION), Sample(7, 1, number))
        lost = set(rows(events)) - set(rows(kept))
        t, x, y = (np.array([row[k] for row in lost]) for k in range(3))
        if not lost:
            kinds["nothing"] += 1
        elif np.ptp(x) <= 8 and np.ptp(y) <= 5:
            kinds["area"] += 1
        elif ((events.t >= t.min()) & (events.t <= t.max())).sum() <= len(lost) + 60:
            kinds["time"] += 1
            assert np.ptp(t) <= 900
        else:
            kinds["random"] += 1
            shares.append(round(10 * len(lost) / len(set(rows(events)))))
    assert all(120 <= kinds[kind] <= 180 for kind in ("nothing", "area", "time", "random"))
    assert set(shares) == set(range(1, 10))


def test_probabilities_are_met_and_samples_differ() -> None:
    events = made(50)
    flips = [
        rows(augment(events, 0, (SENSOR, DURATION), EventAugmentation(horizontal_flip=0.3), FREE, Sample(0, 0, k))[0])
        != rows(events)
        for k in range(1000)
    ]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.05)
    shifts = EventAugmentation(shift=0.1)
    seen = {
        rows(augment(events, 0, (SENSOR, DURATION), shifts, FREE, Sample(0, epoch, 4))[0])[0][1:3]
        for epoch in range(400)
    }
    assert len(seen) == 5 * 7  # -2 to 2 of 20 rows, -3 to 3 of 30 columns
    assert rows(augment(events, 0, (SENSOR, DURATION), EventAugmentation(), FREE, Sample(0, 0, 0))[0]) == rows(events)


def test_labels_follow_or_the_flip_is_refused() -> None:
    events, flip = made(5), EventAugmentation(horizontal_flip=1.0)
    for task in (Saccades, FirstDigit, SaccadeScenes):
        with pytest.raises(SourceError, match=r"horizontal_flip is 1.0: .* set it to 0"):
            augment(events, 0, (SENSOR, DURATION), flip, task.effects, Sample(0, 0, 0))
    reversal = EventAugmentation(time_reversal=1.0)
    assert augment(events, 6, (SENSOR, DURATION), reversal, Saccades.effects, Sample(0, 0, 0))[1] == 6
    with pytest.raises(SourceError, match="time_reversal"):
        augment(events, 0, (SENSOR, DURATION), reversal, FirstDigit.effects, Sample(0, 0, 0))
    effects = ApparentMotion.effects
    moved = [augment(events, k, (SENSOR, DURATION), flip, effects, Sample(0, 0, 0))[1] for k in range(8)]
    assert moved == [4, 3, 2, 1, 0, 7, 6, 5]
    turned = [augment(events, k, (SENSOR, DURATION), reversal, effects, Sample(0, 0, 0))[1] for k in range(8)]
    assert turned == [4, 5, 6, 7, 0, 1, 2, 3]
    swaps = LabelEffects(mirror={3: 5, 5: 3}, reversal="free")
    assert [swaps.mirrored(k) for k in (2, 3, 5)] == [2, 5, 3]
    with pytest.raises(SourceError, match="a horizontal flip changes"):
        Saccades.effects.mirrored(3)


@given(st.integers(1, 32), samples)
@settings(max_examples=40, deadline=None)
def test_slices(slices: int, sample: Sample) -> None:
    for kept in {1, slices // 2 + 1, slices}:
        chosen = aug.kept_slices(slices, kept, sample)
        assert len(set(chosen.tolist())) == len(chosen) == kept
        assert (np.diff(chosen) > 0).all()
        assert 0 <= chosen[0] <= chosen[-1] < slices
    assert sorted(aug.slice_order(slices, "shuffled", sample).tolist()) == list(range(slices))
    assert aug.slice_order(slices, "reversed", sample).tolist() == list(range(slices))[::-1]
    with pytest.raises(ValueError, match="expected 1 to"):
        aug.kept_slices(slices, slices + 1, sample)


def test_every_slice_is_as_likely() -> None:
    chosen = np.array([aug.kept_slices(16, 12, Sample(0, epoch, 3)) for epoch in range(2000)])
    assert np.bincount(chosen.ravel()) / 2000 == pytest.approx([0.75] * 16, abs=0.04)
    orders = np.array([aug.slice_order(4, "shuffled", Sample(0, 0, number)) for number in range(2400)])
    assert len({tuple(order) for order in orders.tolist()}) == 24
    assert np.bincount(orders[:, 0]) / 2400 == pytest.approx([0.25] * 4, abs=0.04)
