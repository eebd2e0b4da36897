"""Transform of recordings of events with classes to a normalised batch of frames.

Every random number is a function of (seed, epoch, row, purpose); see `counter_random.py`. Events are augmented one
recording at a time, as arrays; without augmentation their words are counted as they are in the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.events.augmentation import Sample, augment, kept_slices, slice_order
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.events.frame_augmentation import cut_mix, cutout, draw_mix, mixed_classes, nda
from spikefleet_pipelines.events.label_effects import LabelEffects, label_effects_of
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.windows import EventWindow, StoredRecording, recording_of
from spikefleet_pipelines.store.rows import EventRows, Rows
from spikefleet_pipelines.transforms.event_frames import NO_SLICE, FrameMaker, SliceTable, event_rows
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig

Packed = tuple[Tensor, SliceTable | None]
"""Classes int64 [B] or float32 [B, K], and the table of slices where the frames are made on the device."""


def window_of(recording: StoredRecording, window: str) -> EventWindow:
    """Return a window of a recording as a config names it: recording, span, or the length of its last part."""
    if window == "span":
        return recording.span()
    whole = recording.whole()
    if window == "recording":
        return whole
    length = duration_us(window)
    return recording.window(whole.length - length, length)


@dataclass(frozen=True)
class EventsTransform:
    """Frames and classes of recordings: a `BatchTransform` whose targets are int64 [B].

    Training with `frame_augmentation.cut_mix` has probabilities of the classes instead, float32 [B, K].
    """

    split: EventRows
    config: EventsTransformConfig
    train: bool
    seed: int
    maker: FrameMaker
    effects: LabelEffects

    @classmethod
    def of(cls, split: Rows, config: EventsTransformConfig, train: bool, seed: int) -> "EventsTransform":
        """The transform of a split.

        Raises:
            ValueError: the config does not fit the recordings, or their labels do not survive an augmentation.
        """
        events = event_rows(split, config.kind)
        effects = label_effects_of(events.source)
        config.augmentation.refuse_forbidden(effects)
        return cls(events, config, train, seed, FrameMaker.of(config, events.sensor), effects)

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, Packed]:
        """Load rows; see `BatchTransform`."""
        frames, labels, table = self._load(rows, epoch)
        chosen = self.config.frame_augmentation
        if not self.train or chosen.is_none:
            return frames, (torch.from_numpy(labels), table)
        samples = [Sample(self.seed, epoch, row) for row in rows.tolist()]
        for place, sample in enumerate(samples):
            if chosen.nda is not None:
                frames[place] = nda(frames[place], chosen.nda, sample, self._fill)
            if chosen.cutout > 0:
                frames[place] = cutout(frames[place], chosen.cutout, sample, self._fill)
        return frames, (self._mixed(frames, labels, samples), None)

    @property
    def _fill(self) -> Tensor:
        """The value of a pixel without events, [C, 1, 1]."""
        mean, std = (
            torch.tensor(one, dtype=torch.float32).reshape(-1, 1, 1)
            for one in (self.config.normalise.mean, self.config.normalise.std)
        )
        return (0 - mean) / std

    def _mixed(self, frames: Tensor, labels: NDArray[np.int64], samples: Sequence[Sample]) -> Tensor:
        """Mix frames in place (CutMix); return the classes, as probabilities if any may be mixed."""
        own = torch.from_numpy(labels)
        probability = self.config.frame_augmentation.cut_mix
        if probability == 0:
            return own
        size = (frames.shape[-2], frames.shape[-1])
        partners, shares = own.clone(), torch.zeros(len(own))
        for place, sample in enumerate(samples):
            mix = draw_mix(probability, len(self.split), size, sample)
            if mix is not None:
                other, classes, _ = self._load(np.array([mix.partner], np.int64), sample.epoch)
                frames[place] = cut_mix(frames[place], other[0], mix.area)
                partners[place], shares[place] = int(classes[0]), mix.share
        return mixed_classes(own, partners, shares, len(self.split.class_names))

    def _load(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, NDArray[np.int64], SliceTable | None]:
        """Frames, classes and, for the device, the table of slices; events are augmented, frames are not."""
        labels = self.split.labels[rows]
        windows = [window_of(self.split.recording(row), self.config.window) for row in rows.tolist()]
        if self.train and not self.config.augmentation.is_none:
            for place, row in enumerate(rows.tolist()):
                sample = Sample(self.seed, epoch, row)
                windows[place], labels[place] = self._augmented(windows[place], int(labels[place]), sample)
        frames, table = self.maker.batch(windows, self._slices(rows.tolist(), epoch))
        return frames, labels, table

    def unpack(self, packed: Packed) -> Tensor:
        """Return the classes."""
        return packed[0]

    def on_device(self, images: Tensor, packed: Packed, device: torch.device | str) -> Tensor:
        """Return the frames of a batch; see `BinsOnDevice`."""
        return images if packed[1] is None else self.maker.on(images, packed[1], device)

    def step_ms(self) -> float | None:
        """Return the length of a time slice; see `KnowsStepTime`."""
        if self.config.binning.by == "number" or self.config.window == "span":
            return None
        if self.config.window != "recording":
            return duration_us(self.config.window) / self.config.timesteps / 1000
        lengths = {self.split.recording(row).duration for row in range(len(self.split))}
        return lengths.pop() / self.config.timesteps / 1000 if len(lengths) == 1 else None

    def of_frames(self, frames: NDArray[np.float32]) -> Tensor:
        """Normalise frames [B, T, C, H, W] that were counted elsewhere."""
        return self.maker.of_frames(frames)

    def pictures(self, rows: Sequence[int]) -> list[Tensor]:
        """Draw samples over time, uint8 [3, H, T W + gaps] each; see `DrawsRows`."""
        if not rows:
            return []
        images, packed = self(np.array(rows, np.int64), 0)
        return self.config.pixels(self.on_device(images, packed, "cpu"))

    def _augmented(self, window: EventWindow, label: int, sample: Sample) -> tuple[EventWindow, int]:
        config, sensor = self.config.augmentation, self.split.sensor
        events = window.events()
        relative = EventArrays(events.t - window.start, events.x, events.y, events.p)
        changed, label = augment(relative, label, (sensor, window.length), config, self.effects, sample)
        return recording_of(changed, sensor).window(0, config.kept_us(window.length)), label

    def _slices(self, rows: list[int], epoch: int) -> list[NDArray[np.int64]]:
        """Numbers of the slices of each sample that the network sees, in order."""
        config, slices = self.config, self.config.timesteps
        all_of_them = np.arange(slices)
        if not self.train:
            if config.slice_order == "recorded":
                return [all_of_them] * len(rows)
            return [slice_order(slices, config.slice_order, Sample(self.seed, 0, row)) for row in rows]
        if config.keep_slices is None or config.keep_slices == slices:
            return [all_of_them] * len(rows)
        numbers = rows if config.keep_per == "sample" else [rows[0]] * len(rows)
        kept = [kept_slices(slices, config.keep_slices, Sample(self.seed, epoch, number)) for number in numbers]
        if config.keep_fill == "drop":
            return kept
        return [np.where(np.isin(all_of_them, one), all_of_them, NO_SLICE) for one in kept]
