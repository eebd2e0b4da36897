"""Assignment of windows to steps, lanes and ranks, so that membrane state can be carried from window to window.

A lane is a position in the global batch. It walks one recording in consecutive windows, one a step, then the next
recording; where a recording begins, `starts` is set and the state of the lane is to be reset. Rank r has its own
contiguous lanes for the whole epoch, so a state never leaves its rank.

The plan of an epoch is a pure function of (windows, lanes, mix, seed, epoch): it does not depend on the number of
ranks, and the step alone says where each lane is.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, integers, random_bits
from spikefleet_pipelines.sampling import epoch_order

NO_WINDOW = -1
"""Instead of the number of a window: the lane has nothing left."""
NO_FRAME = -1
"""Instead of the number of a label frame: the window has no label."""


@dataclass(frozen=True)
class StreamWindows:
    """The consecutive windows of every recording of a split.

    Raises:
        ValueError: `offsets` do not ascend from 0 by at least one window a recording, or the lengths differ.
    """

    length_us: int
    """Of each window."""
    offsets: NDArray[np.int64]
    """Number of the first window of each recording, and the number of windows, [n + 1]."""
    ends_us: NDArray[np.int64]
    """End of each window, us from the start of its recording, [w]; what lies before the start is empty."""
    frame_index: NDArray[np.int64]
    """Number of the label frame, in its recording, that the answer at the end of a window is compared with, [w]."""

    def __post_init__(self) -> None:
        count = int(self.offsets[-1]) if len(self.offsets) else -1
        if len(self.offsets) < 2 or self.offsets[0] != 0 or (np.diff(self.offsets) < 1).any():
            raise ValueError("offsets of windows ascend from 0 by at least 1 for each recording")
        if len(self.ends_us) != count or len(self.frame_index) != count:
            raise ValueError(
                f"there are {count} windows, but {len(self.ends_us)} ends and {len(self.frame_index)} frames"
            )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of windows of each recording, [n]."""
        return np.diff(self.offsets)

    def recordings(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the recording of each window; -1 for `NO_WINDOW`."""
        return np.searchsorted(self.offsets, windows, side="right").astype(np.int64) - 1


def labelled_windows(
    durations_us: Sequence[int], label_times_us: Sequence[NDArray[np.int64]], length_us: int
) -> StreamWindows:
    """Cut recordings with boxes at given times into windows, the first label of each at the end of a window.

    A label belongs to the window whose end is nearest to it, if it is less than half a window away; of several, the
    nearest counts. Windows cover each recording up to its end or its last label.

    Args:
        durations_us: of each recording.
        label_times_us: ascending, of each recording; may be empty.
        length_us: of a window.

    Raises:
        ValueError: the length is below 1, or the numbers of recordings differ.
    """
    _check_length(length_us)
    ends, frames = [], []
    for duration, times in zip(durations_us, label_times_us, strict=True):
        first = (int(times[0]) - 1) % length_us + 1 if len(times) else length_us
        last = max(int(duration), int(times[-1]) if len(times) else 1)
        ends.append(np.arange(first, max(last, first) + length_us, length_us, dtype=np.int64))
        frames.append(_nearest(ends[-1], np.asarray(times, np.int64), length_us))
    return _joined(length_us, ends, frames)


def _nearest(ends: NDArray[np.int64], times: NDArray[np.int64], length_us: int) -> NDArray[np.int64]:
    frames = np.full(len(ends), NO_FRAME, np.int64)
    place = np.clip((times - ends[0] + length_us // 2) // length_us, 0, len(ends) - 1)
    distance = np.abs(times - ends[place])
    # The nearest is written last, and of equally near ones the first label.
    for frame in np.lexsort((-np.arange(len(times)), -distance)):
        if 2 * distance[frame] < length_us:
            frames[place[frame]] = frame
    return frames


def equal_windows(durations_us: Sequence[int], length_us: int, labelled: str = "last") -> StreamWindows:
    """Cut recordings with one label each into windows from their start on.

    Args:
        durations_us: of each recording.
        length_us: of a window.
        labelled: "last": only the last window of a recording has its label; "all": every one has.

    Raises:
        ValueError: the length is below 1, or `labelled` is neither.
    """
    _check_length(length_us)
    if labelled not in ("last", "all"):
        raise ValueError(f"labelled is {labelled!r}, expected 'last' or 'all'")
    counts = np.maximum(-(-np.asarray(durations_us, np.int64) // length_us), 1)
    frames = [np.full(count, 0 if labelled == "all" else NO_FRAME, np.int64) for count in counts.tolist()]
    for one in frames:
        one[-1] = 0
    return _joined(length_us, [length_us * np.arange(1, count + 1) for count in counts.tolist()], frames)


def _check_length(length_us: int) -> None:
    if length_us < 1:
        raise ValueError(f"the length of a window is {length_us} us, expected at least 1")


def _joined(length_us: int, ends: list[NDArray[np.int64]], frames: list[NDArray[np.int64]]) -> StreamWindows:
    if not ends:
        raise ValueError("there are no recordings to cut into windows; give at least one")
    offsets = np.cumsum([0, *(len(one) for one in ends)]).astype(np.int64)
    return StreamWindows(length_us, offsets, np.concatenate(ends), np.concatenate(frames))


class StreamStep(NamedTuple):
    """The windows of one rank in one step; arrays have one value for each of its lanes, [b]."""

    step: int
    indices: NDArray[np.int64]
    """Numbers of the windows; `NO_WINDOW` where a lane has nothing left."""
    starts: NDArray[np.bool_]
    """Whether the state is reset before the window."""
    lane: NDArray[np.int64]
    """Numbers of the lanes in the global batch."""
    frame_index: NDArray[np.int64]
    """Label frame of each window in its recording; `NO_FRAME` where it has no label, and where there is no window."""
    global_count: int
    """Labelled windows of all ranks in this step; the loss of a rank is its sum divided by this."""


@dataclass(frozen=True, kw_only=True)
class EventStreamPlan:
    """The windows of one rank.

    Recordings are dealt to lanes by length, longest first, each to the lane that has least; a lane walks its own in an
    order that is drawn for each epoch. Lanes end within one recording of each other. With `fill`, a lane that has ended
    walks further recordings until the longest one has ended too, so that batches are whole: every window occurs at
    least once, and what comes twice is at the end. Without, it has no window, and every window occurs exactly once.

    With `mix`, that part of the lanes has a random labelled window in each step instead, from a fresh state, beside
    the lanes that walk all recordings.

    Attributes:
        windows: of the split.
        lanes: of all ranks: the global batch.
        world_size: number of ranks.
        rank: of this process.
        seed: of the orders.
        mix: part of the lanes with random windows, in [0, 1).
        fill: keep lanes busy to the end of the epoch, for training.
        shuffle: draw the order of each lane's recordings; else they keep that of the split.

    Raises:
        ValueError: `lanes` is not a positive multiple of `world_size`, `rank` is not one of them, `mix` leaves no lane
            to walk recordings, or no window is labelled.
    """

    windows: StreamWindows = field(compare=False, repr=False)
    lanes: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    mix: float = 0.0
    fill: bool = True
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank} of {self.world_size} ranks, expected 0 to one less than their number"
            )
        if self.lanes < 1 or self.lanes % self.world_size:
            raise ValueError(
                f"the global batch is {self.lanes}, expected a positive multiple of the {self.world_size} ranks, "
                "because each lane stays on its rank"
            )
        if not 0 <= self.mix < 1 or not len(self._walking):
            raise ValueError(
                f"mix is {self.mix} of {self.lanes} lanes, expected at least 0, and below 1 so that one lane at least "
                "walks recordings"
            )
        if (self.windows.frame_index == NO_FRAME).all():
            raise ValueError("no window has a label; set a longer window, or another store")

    @property
    def samples(self) -> int:
        """Number of windows of the split."""
        return len(self.windows)

    @property
    def _walking(self) -> NDArray[np.int64]:
        """Lanes that walk recordings; the others are spread evenly between them, and so over ranks."""
        lane = np.arange(self.lanes)
        return np.flatnonzero(np.floor((lane + 1) * self.mix) == np.floor(lane * self.mix))

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps: windows of the lane that has most, the same in every epoch."""
        return max(total for total, _ in self._dealt(np.arange(len(self.windows.counts))))

    def samples_of(self, epoch: int) -> int:
        """Number of labelled windows in an epoch, over all ranks: those that its losses are of."""
        windows = self.table(epoch)
        return int((self.windows.frame_index[windows[windows != NO_WINDOW]] != NO_FRAME).sum())

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[StreamStep]:
        """Yield this rank's windows from `start_step` on.

        The state of the lanes must be that of the step before, unless `start_step` is 0.

        Raises:
            ValueError: `start_step` is not in 0 to `steps_per_epoch`.
        """
        table = self.table(epoch)
        steps = table.shape[1]
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step is {start_step}, expected 0 to {steps}, the steps of an epoch")
        return self._batches(table, start_step)

    def _batches(self, table: NDArray[np.int64], start_step: int) -> Iterator[StreamStep]:
        of_rank = self.lanes // self.world_size
        mine = slice(self.rank * of_rank, (self.rank + 1) * of_rank)
        lane = np.arange(mine.start, mine.stop)
        walks = np.isin(np.arange(self.lanes), self._walking)
        for step in range(start_step, table.shape[1]):
            windows = table[:, step]
            frames = np.where(windows == NO_WINDOW, NO_FRAME, self.windows.frame_index[windows])
            starts = np.isin(windows, self.windows.offsets[:-1]) | ~walks
            count = int((frames != NO_FRAME).sum())
            yield StreamStep(step, windows[mine], starts[mine], lane, frames[mine], count)

    def table(self, epoch: int) -> NDArray[np.int64]:
        """Compute the window of every lane in every step of an epoch, [lanes, steps]."""
        counts, offsets = self.windows.counts, self.windows.offsets
        order = epoch_order(len(counts), self.seed, epoch) if self.shuffle else np.arange(len(counts))
        dealt = self._dealt(order)
        steps = max(total for total, _ in dealt)
        table = np.full((self.lanes, steps), NO_WINDOW, np.int64)
        place = np.argsort(order)
        for number, (lane, (_, recordings)) in enumerate(zip(self._walking.tolist(), dealt, strict=True)):
            # In the order of the epoch: that of dealing is by length.
            walk = recordings[np.argsort(place[recordings])]
            if self.fill:
                walk = np.concatenate([walk, self._further(epoch, number, walk, steps)])
            windows = np.concatenate([np.arange(offsets[one], offsets[one + 1]) for one in walk.tolist()] or [walk])
            table[lane, : len(windows)] = windows[:steps]
        return self._with_random(table, epoch)

    def _dealt(self, order: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """(windows, recordings) of each walking lane; of equally long recordings `order` says which comes first."""
        counts = self.windows.counts
        heap = [(0, lane) for lane in range(len(self._walking))]
        lanes: list[list[int]] = [[] for _ in heap]
        for recording in order[np.argsort(-counts[order], kind="stable")].tolist():
            total, lane = heapq.heappop(heap)
            lanes[lane].append(recording)
            heapq.heappush(heap, (total + int(counts[recording]), lane))
        totals = {lane: total for total, lane in heap}
        return [(totals[lane], np.array(one, np.int64)) for lane, one in enumerate(lanes)]

    def _further(self, epoch: int, number: int, walk: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
        """Recordings that a walking lane reads next, at least up to `steps` windows."""
        counts = self.windows.counts
        missing = steps - int(counts[walk].sum())
        keys = random_bits(self.seed, epoch, np.arange(len(counts)) + number * len(counts), Draw.STREAM_FILL)
        further = np.argsort(keys, kind="stable")
        rounds = -(-max(missing, 0) // int(counts.sum()))
        candidates = np.tile(further, rounds)
        needed = int(np.searchsorted(np.cumsum(counts[candidates]), missing)) + 1 if missing > 0 else 0
        return candidates[:needed].astype(np.int64)

    def _with_random(self, table: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        labelled = np.flatnonzero(self.windows.frame_index != NO_FRAME)
        for lane in np.setdiff1d(np.arange(self.lanes), self._walking).tolist():
            at = lane + self.lanes * np.arange(table.shape[1])
            table[lane] = labelled[integers(self.seed, epoch, at, Draw.STREAM_RANDOM, len(labelled))]
        return table
