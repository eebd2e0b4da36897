"""What the audit of an event store counts, collected while recordings are written."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.words import WordLayout
from spikefleet_pipelines.store.event_format import EventAudit, HotPixel

_EARLY_US = 500_000
_HOT = 20
_SHOWN = 20


@dataclass
class EventStatistics:
    """Sums over the recordings of a shard; those of several shards are merged."""

    pixels: NDArray[np.int64]
    """Events of each polarity and pixel, flat [2^address_bits] as in a word."""
    counts: list[int] = field(default_factory=list)
    """Events of each recording."""
    durations: list[int] = field(default_factory=list)
    """us."""
    out_of_order: int = 0
    dropped: int = 0
    dropped_recordings: int = 0
    early_labels: int = 0
    late_labels: int = 0
    repeated_boxes: int = 0

    @classmethod
    def of(cls, layout: WordLayout) -> "EventStatistics":
        """Of no recording yet."""
        return cls(np.zeros(1 << layout.address_bits, np.int64))

    def add_words(self, words: NDArray[np.uint32], layout: WordLayout, sign: int = 1) -> None:
        """Count the events of a chunk; with sign -1 take them back."""
        addresses = words & layout.address_mask
        if len(words) * 4 < len(self.pixels):  # few events: a pass over all pixels would cost more
            np.add.at(self.pixels, addresses, sign)
        else:
            self.pixels += sign * np.bincount(addresses, minlength=len(self.pixels))

    def add_labels(self, frames: LabelFrames, last_event: int) -> None:
        """Count the unusual labels of one recording; times from its start."""
        objects = np.diff(frames.offsets)
        self.early_labels += int(objects[frames.times < _EARLY_US].sum())
        self.late_labels += int(objects[frames.times > last_event].sum())
        self.repeated_boxes += _repeated(frames)

    def merge(self, other: "EventStatistics") -> None:
        """Add the recordings of another shard."""
        self.pixels += other.pixels
        for name in ("counts", "durations"):
            getattr(self, name).extend(getattr(other, name))
        for name in (
            "out_of_order",
            "dropped",
            "dropped_recordings",
            "early_labels",
            "late_labels",
            "repeated_boxes",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def audit(self, layout: WordLayout) -> EventAudit:
        """The entry of the manifest."""
        counts, durations = np.array(self.counts, np.int64), np.array(self.durations, np.int64)
        rates = counts[durations > 0] * 1e6 / durations[durations > 0]
        events = int(counts.sum())
        grid = self.pixels.reshape(2, 1 << layout.y_bits, 1 << layout.x_bits)
        pixels = grid.sum(0)
        hot = _hot(pixels)
        return EventAudit(
            recordings=len(counts),
            empty_recordings=int((counts == 0).sum()),
            dropped_recordings=self.dropped_recordings,
            events=events,
            on_share=float(grid[1].sum()) / max(events, 1),
            duration_us=int(durations.sum()),
            shortest_us=int(durations.min(initial=1 << 62)) if len(durations) else 0,
            longest_us=int(durations.max(initial=0)),
            rate_min=float(rates.min()) if len(rates) else 0.0,
            rate_median=float(np.median(rates)) if len(rates) else 0.0,
            rate_max=float(rates.max()) if len(rates) else 0.0,
            out_of_order=self.out_of_order,
            dropped=self.dropped,
            early_labels=self.early_labels,
            late_labels=self.late_labels,
            repeated_boxes=self.repeated_boxes,
            hot_pixels=len(hot),
            hot_share=float(pixels[tuple(hot.T)].sum()) / max(events, 1),
            hottest=tuple(HotPixel(x=int(x), y=int(y), events=int(pixels[y, x])) for y, x in hot[:_SHOWN]),
        )


def _hot(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row and column of the pixels with over 20 times the median of those with events, most events first, [n, 2]."""
    shown = pixels[pixels > 0]
    if not len(shown):
        return np.empty((0, 2), np.int64)
    found = np.argwhere(pixels > _HOT * np.median(shown))
    return found[np.argsort(-pixels[tuple(found.T)], kind="stable")]


def _repeated(frames: LabelFrames) -> int:
    """Number of boxes that equal the one before of the same track."""
    order = np.argsort(frames.track_ids, kind="stable")  # of one track, times stay in order
    tracks, boxes = frames.track_ids[order], frames.boxes[order]
    same = (tracks[1:] == tracks[:-1]) & (tracks[1:] >= 0) & (boxes[1:] == boxes[:-1]).all(1)
    return int(same.sum())
