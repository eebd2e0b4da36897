"""Scenes whose digits stop: nothing but noise during a pause, while their boxes stay."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.pixel_model import DEFAULT, IDEAL
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.saccade_scenes import SIDE, BoxFrame, SaccadeScenes
from spikefleet_pipelines.events.saccades import Digits
from spikefleet_pipelines.sources import check_options, find_source, prepare
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from support.event_sources import same

SCENES = 16
_TAIL_US = 40_000  # the photoreceptor of a dark pixel settles within 8 of its time constants of 5.3 ms


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits(None, DigitsOptions(), 0).splits


@pytest.fixture(scope="module")
def task(digits: Digits) -> SaccadeScenes:
    return SaccadeScenes(digits, pauses=True)


@pytest.fixture(scope="module")
def scenes(task: SaccadeScenes) -> list[tuple[EventArrays, list[BoxFrame]]]:
    return task.samples("train", range(SCENES))


def count(events: EventArrays, start: int, stop: int, where: NDArray[np.bool_] | None = None) -> int:
    chosen = (events.t >= start) & (events.t < stop)
    return int(chosen.sum() if where is None else (chosen & where[events.y, events.x]).sum())


def test_pauses_are_200_to_400_ms(task: SaccadeScenes) -> None:
    lengths, moves = [], []
    for index in range(300):
        (start, stop), (second, end) = task.pauses_of("train", index)
        lengths += [stop - start, end - second]
        moves += [start, second - stop, task.duration_us - end]
    assert 200_000 <= min(lengths) < 205_000 < 395_000 < max(lengths) <= 400_000
    assert min(moves) >= 80_000
    assert task.duration_us == 1_200_000
    assert task.pauses_of("val", 3) != task.pauses_of("train", 3) != task.pauses_of("train", 4)


def test_ideal_pixels_are_silent_in_a_pause(digits: Digits) -> None:
    task = SaccadeScenes(digits, model=IDEAL, pauses=True)
    step = IDEAL.step_us
    for index, (events, _) in enumerate(task.samples("train", range(6))):
        (start, stop), (second, end) = task.pauses_of("train", index)
        for first, last in ((start, stop), (second, end)):
            settled = -(-first // step) * step + 1  # the last events of a step may be rounded to its end
            assert count(events, settled, last // step * step) == 0
        for first, last in ((0, start), (stop, second), (end, task.duration_us)):
            assert count(events, first, last) > (last - first) * 1e-3  # 1,000 a second


def test_there_is_only_noise_in_a_pause(task: SaccadeScenes, scenes: list[tuple[EventArrays, list[BoxFrame]]]) -> None:
    """At the rate of a dark pixel, of both polarities, and no more where the digits are."""
    dark, inside, on = [], [], []
    for index, (events, frames) in enumerate(scenes):
        start, stop = task.pauses_of("train", index)[0]
        still = next(frame for frame in frames if start < frame.t <= stop)
        digit = np.zeros((SIDE, SIDE), bool)
        for x, y, width, height in still.boxes.round().astype(int).tolist():
            digit[max(y, 0) : y + height, max(x, 0) : x + width] = True
        seconds = (stop - start - _TAIL_US) * 1e-6
        dark.append(count(events, start + _TAIL_US, stop, ~digit) / seconds / (~digit).sum())
        inside.append(count(events, start + _TAIL_US, stop, digit) / seconds / digit.sum())
        here = events.select((events.t >= start + _TAIL_US) & (events.t < stop))
        on.append(here.p.mean())
        assert count(events, start - 50_000, start, digit) / 0.05 / digit.sum() > 4 * dark[-1]
    assert np.mean(dark) == pytest.approx(DEFAULT.noise_hz, rel=0.03)
    assert DEFAULT.noise_bright < np.mean(inside) < np.mean(dark)
    assert np.mean(on) == pytest.approx(0.5, abs=0.03)


def test_boxes_go_on_and_stay_in_a_pause(task: SaccadeScenes, scenes: list[tuple[EventArrays, list[BoxFrame]]]) -> None:
    for index, (_, frames) in enumerate(scenes):
        assert [frame.t for frame in frames] == list(range(50_000, 1_200_001, 50_000))
        pauses = task.pauses_of("train", index)
        stood = 0
        for before, frame in pairwise(frames):
            still = any(start <= before.t and frame.t <= stop for start, stop in pauses)
            assert np.array_equal(before.boxes, frame.boxes) == still
            assert np.array_equal(before.labels, frame.labels)
            stood += still
        assert 4 <= stood <= 16
        for box in np.concatenate([frame.boxes for frame in frames]):
            assert -2 <= min(box[:2]) <= max(box[:2] + box[2:]) <= SIDE + 2


def test_a_scene_is_a_function_of_its_numbers(
    digits: Digits, task: SaccadeScenes, scenes: list[tuple[EventArrays, list[BoxFrame]]]
) -> None:
    events, frames = task.sample("train", 5)
    assert same(events, scenes[5][0])
    assert all(np.array_equal(one.boxes, other.boxes) for one, other in zip(frames, scenes[5][1], strict=True))
    assert (len(events), int(events.t.sum())) == (
        13099,
        7816909516,
    )  # a store made before must be made again, bit for bit
    assert not same(SaccadeScenes(digits, seed=1, pauses=True).sample("train", 5)[0], events)


def test_a_store_tells_what_stands_still(task: SaccadeScenes, tmp_path: Path) -> None:
    store = prepare("saccade_scenes", None, tmp_path / "s", train=2, val=1, test=1, pauses=True)
    assert store.manifest.options["pauses"] is True
    split = store.recordings("train")
    assert split.recording(1).duration == 1_200_000
    for row in range(2):
        pauses = task.pauses_of("train", row)
        for number, time in enumerate(split.frames(row).times.tolist()):
            moment = split.annotations(row, number).moment
            assert moment is not None
            assert (moment.recording, moment.time_us) == (row, time)
            since = [-(-start // 50_000) * 50_000 for start, stop in pauses if start <= time <= stop]
            assert moment.still_us == (time - since[0] if since else 0)


def test_stores_without_pauses_are_those_of_before(tmp_path: Path) -> None:
    """The option is recorded where it is used only, so that the hash of a store stays."""
    store = prepare("saccade_scenes", None, tmp_path / "s", train=2, val=1, test=1)
    assert store.manifest.options == {"train": 2, "val": 1, "test": 1, "seed": 0}
    assert [store.recordings("train").annotations(0, k).moment.still_us for k in range(4)] == [0, 0, 0, 0]  # type: ignore[union-attr]


def test_sides_and_speeds_are_those_that_are_asked_for(digits: Digits) -> None:
    large = SaccadeScenes(digits, model=IDEAL, sides=(30, 40), speeds=(90.0, 110.0))
    usual = SaccadeScenes(digits, model=IDEAL)
    sides: dict[str, list[float]] = {"large": [], "usual": []}
    for name, task in (("large", large), ("usual", usual)):
        for _, frames in task.samples("train", range(12)):
            first, last = frames[0], frames[-1]
            way = np.hypot(*(last.boxes[:, :2] - first.boxes[:, :2]).T)
            speeds = way / ((last.t - first.t) * 1e-6)
            assert ((speeds > task.speeds[0] - 1) & (speeds < task.speeds[1] + 1)).all()
            sides[name] += first.boxes[:, 3].tolist()
    assert max(sides["large"]) <= 42
    assert np.mean(sides["large"]) > np.mean(sides["usual"]) + 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sides": [30, 20]}, r"sides=\[30, 20\]: write the smaller number first"),
        ({"sides": [7, 20]}, "greater than or equal to 8"),
        ({"speeds": [10.0, 200.0]}, "less than or equal to 150"),
        ({"speeds": [50.0, 100.0], "pauses": True}, "a digit of 32 pixels that moves for 0.8 s leaves the 96 pixels"),
    ],
)
def test_scenes_that_no_sensor_holds_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        check_options(find_source("saccade_scenes"), options)


def test_the_usual_scenes_keep_their_hash() -> None:
    source = find_source("saccade_scenes")
    given = check_options(source, {"sides": [14, 32], "speeds": [20.0, 70.0]})
    assert given.model_dump(mode="json") == {"train": 2000, "val": 200, "test": 200}


def test_all_digits_may_be_of_one_class(digits: Digits, tmp_path: Path) -> None:
    one, ten = (SaccadeScenes(digits, one_class=given).samples("train", range(3)) for given in (True, False))
    for (events, frames), (others, labelled) in zip(one, ten, strict=True):
        assert same(events, others)
        assert not frames[0].labels.any()
        assert np.array_equal(frames[-1].boxes, labelled[-1].boxes)
    assert any(frames[0].labels.any() for _, frames in ten)
    store = prepare("saccade_scenes", None, tmp_path / "s", train=2, val=1, test=1, one_class=True)
    assert (store.manifest.class_names, store.manifest.category_ids) == (("digit",), (11,))
    assert store.manifest.options["one_class"] is True
    assert set(store.recordings("train").annotations(0, 0).category_ids.tolist()) == {11}
