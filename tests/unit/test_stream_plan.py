"""Streams: every window once, lanes of one recording after the other, the same on any world size and after a resume."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spikefleet_pipelines.stream_plan import (
    NO_FRAME,
    NO_WINDOW,
    EventStreamPlan,
    StreamStep,
    StreamWindows,
    equal_windows,
    labelled_windows,
)

WINDOW = 100


@st.composite
def splits(draw: st.DrawFn) -> StreamWindows:
    durations = draw(st.lists(st.integers(0, 12 * WINDOW), min_size=1, max_size=40))
    return equal_windows(durations, WINDOW, draw(st.sampled_from(["last", "all"])))


def steps(plan: EventStreamPlan, epoch: int = 0, start: int = 0) -> list[StreamStep]:
    return list(plan.batches(epoch, start))


def check_lanes(windows: StreamWindows, found: list[StreamStep]) -> None:
    """Each lane: recordings one after the other, each from its first window on; whole ones, but for a last one."""
    for column in np.array([step.indices for step in found]).T.tolist():
        walked = [window for window in column if window != NO_WINDOW]
        assert column[: len(walked)] == walked, "a lane without a window has no more"
        starts = set(windows.offsets[:-1].tolist())
        assert not walked or walked[0] in starts
        for before, after in pairwise(walked):
            ends = before + 1 in windows.offsets
            assert after in starts if ends else after == before + 1


@settings(max_examples=150, deadline=None)
@given(splits(), st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_window_exactly_once(windows: StreamWindows, lanes: int, seed: int, epoch: int) -> None:
    plan = EventStreamPlan(windows=windows, lanes=lanes, seed=seed, fill=False)
    found = steps(plan, epoch)
    assert len(found) == plan.steps_per_epoch
    seen = np.concatenate([step.indices for step in found])
    assert np.array_equal(np.sort(seen[seen != NO_WINDOW]), np.arange(len(windows)))
    check_lanes(windows, found)
    assert sum(step.global_count for step in found) == (windows.frame_index != NO_FRAME).sum()


@settings(max_examples=150, deadline=None)
@given(splits(), st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_filled_lanes_are_whole_and_repeat_only_at_the_end(
    windows: StreamWindows, lanes: int, seed: int, epoch: int
) -> None:
    plan = EventStreamPlan(windows=windows, lanes=lanes, seed=seed)
    exact = EventStreamPlan(windows=windows, lanes=lanes, seed=seed, fill=False)
    found = steps(plan, epoch)
    assert len(found) == exact.steps_per_epoch
    check_lanes(windows, found)
    for step, alone in zip(found, steps(exact, epoch), strict=True):
        assert (step.indices != NO_WINDOW).all()
        there = alone.indices != NO_WINDOW
        assert np.array_equal(step.indices[there], alone.indices[there])
        assert np.array_equal(step.starts, np.isin(step.indices, windows.offsets[:-1]))
        assert np.array_equal(step.frame_index, windows.frame_index[step.indices])
    # Lanes differ by no more than a recording, so that little is seen twice.
    ends = (exact.table(epoch) != NO_WINDOW).sum(1)
    assert ends.max() - ends.min() <= windows.counts.max()


@settings(max_examples=80, deadline=None)
@given(splits(), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.floats(0, 0.7), st.booleans(), st.data())
def test_ranks_share_the_lanes_and_resume_within_an_epoch(
    windows: StreamWindows, of_rank: int, world: int, mix: float, fill: bool, data: st.DataObject
) -> None:
    lanes = of_rank * world
    if lanes == 1:
        mix = 0.0
    alone = steps(EventStreamPlan(windows=windows, lanes=lanes, seed=5, mix=mix, fill=fill), 2)
    start = data.draw(st.integers(0, len(alone)))
    plans = [
        EventStreamPlan(windows=windows, lanes=lanes, world_size=world, rank=rank, seed=5, mix=mix, fill=fill)
        for rank in range(world)
    ]
    tails = [steps(plan, 2, start) for plan in plans]
    for expected, *parts in zip(alone[start:], *tails, strict=True):
        assert {part.step for part in parts} == {expected.step}
        assert {part.global_count for part in parts} == {expected.global_count}
        for name in ("indices", "starts", "lane", "frame_index"):
            together = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(together, getattr(expected, name)), name
    for rank, tail in enumerate(tails):
        assert all(np.array_equal(step.lane, rank * of_rank + np.arange(of_rank)) for step in tail)


def test_a_part_of_the_lanes_has_random_windows_from_a_fresh_state() -> None:
    windows = equal_windows([6 * WINDOW] * 20, WINDOW)
    found = steps(EventStreamPlan(windows=windows, lanes=8, mix=0.5, seed=1))
    walks = np.array([1, 0, 1, 0, 1, 0, 1, 0], bool)
    for step in found:
        assert step.starts[~walks].all()
        assert (step.frame_index[~walks] != NO_FRAME).all()
    check_lanes(windows, [step._replace(indices=step.indices[walks]) for step in found])
    walked = np.concatenate([step.indices[walks] for step in found])
    assert set(walked.tolist()) == set(range(len(windows)))
    drawn = np.concatenate([step.indices[~walks] for step in found])
    assert len(np.unique(drawn)) > 15
    assert not any(step.starts[walks].all() for step in found[1:6])


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    windows = equal_windows([3 * WINDOW] * 30, WINDOW)
    plan = EventStreamPlan(windows=windows, lanes=4, seed=1)
    first = plan.table(0)
    assert np.array_equal(first, plan.table(0))
    assert not np.array_equal(first, plan.table(1))
    assert not np.array_equal(first, EventStreamPlan(windows=windows, lanes=4, seed=2).table(0))
    unshuffled = EventStreamPlan(windows=windows, lanes=1, shuffle=False).table(7)
    assert np.array_equal(unshuffled, np.arange(90)[None])


def test_long_recordings_do_not_leave_lanes_idle() -> None:
    """In the order of the split the long one would come last, and three lanes would wait for it."""
    windows = equal_windows([WINDOW] * 30 + [10 * WINDOW], WINDOW)
    plan = EventStreamPlan(windows=windows, lanes=4, fill=False)
    assert plan.steps_per_epoch == 10
    assert (plan.table(0) == NO_WINDOW).sum() == 0


def test_windows_end_at_their_labels() -> None:
    times = np.array([130, 231, 329, 420, 900], np.int64)
    windows = labelled_windows([1000, 250, 40], [times, np.array([300]), np.array([], np.int64)], WINDOW)
    ends: list[NDArray[np.int64]] = np.split(windows.ends_us, windows.offsets[1:-1])
    frames = np.split(windows.frame_index, windows.offsets[1:-1])
    assert ends[0].tolist() == [30, 130, 230, 330, 430, 530, 630, 730, 830, 930, 1030]
    assert frames[0].tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, -1, 4, -1]
    assert (ends[1].tolist(), frames[1].tolist()) == ([100, 200, 300], [-1, -1, 0])
    assert (ends[2].tolist(), frames[2].tolist()) == ([100], [-1])
    assert windows.recordings(np.array([0, 10, 11, 14, NO_WINDOW])).tolist() == [0, 0, 1, 2, -1]


def test_of_several_labels_the_nearest_counts() -> None:
    windows = labelled_windows([300], [np.array([100, 190, 204, 205, 250])], WINDOW)
    assert windows.frame_index.tolist() == [0, 2, NO_FRAME]  # 205 is farther, and 250 half a window away


def test_recordings_with_one_label() -> None:
    last, every = (equal_windows([250, 0, 200], WINDOW, labelled) for labelled in ("last", "all"))
    assert last.ends_us.tolist() == every.ends_us.tolist() == [100, 200, 300, 100, 100, 200]
    assert last.frame_index.tolist() == [-1, -1, 0, 0, -1, 0]
    assert every.frame_index.tolist() == [0] * 6


def test_bad_arguments_are_refused() -> None:
    windows = equal_windows([200], WINDOW)
    for arguments, words in (
        ({"lanes": 5, "world_size": 2}, "global batch is 5, expected a positive multiple of the 2 ranks"),
        ({"lanes": 0}, "global batch is 0"),
        ({"lanes": 2, "rank": 1}, "rank is 1 of 1"),
        ({"lanes": 2, "mix": 1.0}, "mix is 1.0"),
        ({"lanes": 2, "mix": -0.1}, "mix is -0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            EventStreamPlan(windows=windows, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_step is 3, expected 0 to 2"):
        EventStreamPlan(windows=windows, lanes=1).batches(0, 3)
    with pytest.raises(ValueError, match="no window has a label"):
        EventStreamPlan(windows=labelled_windows([200], [np.array([], np.int64)], WINDOW), lanes=1)
    for make, words in (
        (lambda: equal_windows([200], 0), "length of a window is 0 us"),
        (lambda: equal_windows([], WINDOW), "no recordings"),
        (lambda: equal_windows([200], WINDOW, "first"), "labelled is 'first'"),
        (lambda: StreamWindows(1, np.array([0, 0]), np.array([]), np.array([])), "offsets of windows ascend"),
        (lambda: StreamWindows(1, np.array([0, 2]), np.array([1]), np.array([0])), "there are 2 windows, but 1 ends"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
