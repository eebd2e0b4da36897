"""Windows of events as batches of frames [B, T, C, H, W], counted in the loader or, from words, on the device.

What is sent to the device is a table of slices: where each begins and ends among the words of the batch. Counts are
integers, and what follows them is one rounded operation for each value, so both ways give the same frames to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.binning import Edges, slices_by_number, slices_by_time
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.representations import NO_EVENT, bin_events
from spikefleet_pipelines.events.windows import EventWindow
from spikefleet_pipelines.events.words import WordLayout
from spikefleet_pipelines.shared_batches import empty_batch
from spikefleet_pipelines.store.rows import EventRows, Rows
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig
from spikefleet_pipelines.transforms.normalise_config import Normalisation

NO_SLICE = -1
"""In the place of a number of a slice: zeros."""


OUTSIDE = -1
"""In the place of a row or column of the sensor's frame: a pixel that no event can reach."""


class Grid(NamedTuple):
    """The pixel of a frame that each pixel of the network's input shows; nearest, and the same for all slices."""

    rows: NDArray[np.int64]
    """[H']."""
    columns: NDArray[np.int64]
    """[W']."""


class SliceTable(NamedTuple):
    """Where the slices of a batch are among its words; sent beside the words of a batch."""

    starts: NDArray[np.int64]
    """[B, K]."""
    stops: NDArray[np.int64]
    """[B, K]."""
    grids: Sequence[Grid] | None
    """Of each sample; None where frames are shown as they are."""


def event_rows(split: Rows, kind: str) -> EventRows:
    """Return a split as one of events.

    Raises:
        StoreError: it has images.
    """
    if not hasattr(split, "recording"):
        raise StoreError(
            f"split {split.name!r} of {split.location} has images, but transform.kind is {kind!r}, which reads "
            "recordings of events; set another kind"
        )
    return split  # type: ignore[return-value]  # what has recordings has the rest


@dataclass(frozen=True)
class FrameMaker:
    """Bins windows of one sensor.

    Attributes:
        layout: the bits of a word.
        binning: T and the representation.
        normalise: of the frames' values.
        on_device: send words instead of frames.
    """

    layout: WordLayout
    binning: BinningConfig
    normalise: Normalisation
    on_device: bool

    @classmethod
    def of(cls, config: EventFramesConfig, sensor: tuple[int, int]) -> "FrameMaker":
        """The maker of a config. Raises ValueError if the config does not fit the sensor."""
        config.check_frames(sensor)
        return cls(WordLayout(*sensor), config.binning, config.normalise, config.bin_on == "device")

    @property
    def nothing(self) -> float:
        """The value of a pixel without events."""
        return float(NO_EVENT) if self.binning.kind == "last_polarity" else 0.0

    def batch(
        self,
        windows: Sequence[EventWindow],
        slices: Sequence[NDArray[np.int64]],
        grids: Sequence[Grid] | None = None,
    ) -> tuple[Tensor, SliceTable | None]:
        """Make a batch.

        Args:
            windows: of the samples.
            slices: of each sample, the numbers of the slices to show, in order; all of one length K.
            grids: of each sample, all of one size; None shows frames as they are.

        Returns:
            Frames float32 [B, K, C, H, W], normalised; or, for the device, words int32 [N] with the table of slices.
        """
        if self.on_device:
            return self._words(windows, slices, grids)
        height, width = self.binning.size or self.layout.sensor
        if grids is not None:
            height, width = len(grids[0].rows), len(grids[0].columns)
        frames = empty_batch((len(windows), len(slices[0]), self.binning.channels, height, width))
        for place, (sample, window, chosen) in enumerate(zip(frames.numpy(), windows, slices, strict=True)):
            binned = bin_events(window, self.binning)[np.maximum(chosen, 0)]
            if grids is None:
                sample[...] = binned
            else:
                rows, columns = grids[place]
                sample[...] = binned[..., np.maximum(rows, 0)[:, None], np.maximum(columns, 0)]
                sample[..., rows == OUTSIDE, :] = self.nothing
                sample[..., columns == OUTSIDE] = self.nothing
            sample[chosen == NO_SLICE] = self.nothing
        return self._normalised(frames), None

    def of_frames(self, frames: NDArray[np.float32], grid: Grid | None = None) -> Tensor:
        """Place and normalise frames [B, K, C, H, W] that were counted elsewhere."""
        values = torch.tensor(frames, dtype=torch.float32)
        return self._normalised(values if grid is None else _placed(values, grid, self.nothing))

    def on(self, words: Tensor, table: SliceTable, device: torch.device | str) -> Tensor:
        """Count words on a device.

        Args:
            words: int32 [N], of `batch`.
            table: of `batch`.
            device: to count on.

        Returns:
            Frames float32 [B, K, C, H, W] on the device, normalised.
        """
        starts, stops = (torch.from_numpy(one).to(device) for one in (table.starts, table.stops))
        counts = _counted(words.to(device, non_blocking=True), starts, stops, self.layout)
        frames = _finished(counts, self.binning)
        if table.grids is not None:
            frames = torch.stack([_placed(one, grid) for one, grid in zip(frames, table.grids, strict=True)])
        return self._normalised(frames)

    def _words(
        self, windows: Sequence[EventWindow], slices: Sequence[NDArray[np.int64]], grids: Sequence[Grid] | None
    ) -> tuple[Tensor, SliceTable]:
        words = empty_batch((sum(len(window) for window in windows),), torch.int32)
        if windows:
            np.concatenate([window.words for window in windows], out=words.numpy().view(np.uint32))
        starts, stops, before = [], [], 0
        for window, chosen in zip(windows, slices, strict=True):
            edges = _edges(window, self.binning) + before
            shown = np.maximum(chosen, 0)
            starts.append(edges[:-1][shown])
            stops.append(np.where(chosen == NO_SLICE, edges[:-1][shown], edges[1:][shown]))
            before += len(window)
        return words, SliceTable(np.stack(starts), np.stack(stops), grids)

    def _normalised(self, frames: Tensor) -> Tensor:
        if self.normalise == Normalisation():
            return frames
        mean, std = (
            torch.tensor(one, dtype=torch.float32, device=frames.device).reshape(-1, 1, 1)
            for one in (self.normalise.mean, self.normalise.std)
        )
        return frames.sub_(mean).div_(std)


def _edges(window: EventWindow, binning: BinningConfig) -> Edges:
    if binning.by == "number":
        return slices_by_number(window, binning.slices)
    return slices_by_time(window, binning.slices, binning.compat)


def _counted(words: Tensor, starts: Tensor, stops: Tensor, layout: WordLayout) -> Tensor:
    """Count words int32 [N] by slice, polarity and pixel: int64 [B, K, 2, H, W]."""
    lengths = (stops - starts).flatten()
    slices = torch.repeat_interleave(torch.arange(lengths.numel(), device=words.device), lengths)
    first = starts.flatten() - (lengths.cumsum(0) - lengths)
    chosen = words[torch.arange(slices.numel(), device=words.device) + first[slices]].to(torch.int64)
    column = chosen & ((1 << layout.x_bits) - 1)
    row = (chosen >> layout.x_bits) & ((1 << layout.y_bits) - 1)
    polarity = (chosen >> (layout.x_bits + layout.y_bits)) & 1
    keys = ((slices * 2 + polarity) * layout.height + row) * layout.width + column
    cells = lengths.numel() * 2 * layout.height * layout.width
    return torch.bincount(keys, minlength=cells).reshape(*starts.shape, 2, layout.height, layout.width)


def _finished(counts: Tensor, binning: BinningConfig) -> Tensor:
    """What follows counting, as `representations.py` does it: [B, K, 2, H, W] -> float32 [B, K, 2, H', W']."""
    if binning.kind == "binary":
        counts = counts.clamp_max(1)
    if binning.size is not None and binning.size != tuple(counts.shape[-2:]):
        counts = _resized(counts, binning.size, binning.resize)
    frames = counts.to(torch.float32)
    if binning.normalise == "slice_max":
        frames /= frames.amax((-3, -2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if binning.clip is not None:
        limit = binning.clip if binning.normalise != "none" else int(binning.clip)
        frames = frames.clamp_max(limit)
    return frames


def _placed(frames: Tensor, grid: Grid, nothing: float = 0.0) -> Tensor:
    """Show frames [..., H, W] on a grid: [..., H', W']."""
    rows, columns = (torch.from_numpy(one).to(frames.device) for one in grid)
    shown = frames[..., rows.clamp_min(0)[:, None], columns.clamp_min(0)]
    return shown.where((rows != OUTSIDE)[:, None] & (columns != OUTSIDE), nothing)


def _resized(counts: Tensor, size: tuple[int, int], how: str) -> Tensor:
    height, width = counts.shape[-2:]
    if how == "nearest":
        rows, columns = (
            torch.arange(new, device=counts.device) * old // new for new, old in zip(size, (height, width), strict=True)
        )
        return counts[..., rows[:, None], columns]
    blocks = counts.reshape(*counts.shape[:-2], size[0], height // size[0], size[1], width // size[1])
    return blocks.sum((-3, -1))
