"""Augmentation of events before they are binned; what is random is a function of (seed, epoch, sample).

Sensors are (height, width); events keep their type and, unless said otherwise, their order and number.

* Dropping: Gu, Sng, Hu and Yu, "EventDrop: data augmentation for event-based learning", IJCAI 2021. Deviation: of
  random dropping, which keeps each event independently, the share is met on average and not exactly.
* Flip and roll: as in the papers that train on DVS-CIFAR10; their range of 5 pixels at 48x48 is given by the side.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, normal, random_bits, uniform
from spikefleet_pipelines.events.augmentation_config import EventAugmentation
from spikefleet_pipelines.events.label_effects import LabelEffects
from spikefleet_pipelines.events.recording import EventArrays, Sensor

_DROP_RATIOS = np.arange(1, 10) / 10
_DROP_SIDES = np.arange(1, 6) / 20
# Numbers of one sample, from Draw.EVENT_AUGMENT on.
_FLIP, _POLARITY, _REVERSAL, _SHIFT, _CROP, _DROP = 0, 1, 2, 3, 5, 6
_NUMBERS = 10


class Sample(NamedTuple):
    """What identifies the random numbers of a sample."""

    seed: int
    epoch: int
    number: int


def augment(
    events: EventArrays,
    label: int,
    frame: tuple[Sensor, int],
    config: EventAugmentation,
    effects: LabelEffects,
    sample: Sample,
) -> tuple[EventArrays, int]:
    """Apply the augmentations of a training, in the order of the fields of its configuration.

    Args:
        events: of the sample, 0 <= t < duration.
        label: its class.
        frame: the sensor, and the duration of the sample in microseconds.
        config: what to apply.
        effects: on labels, as the data set declares them.
        sample: the numbers of the sample.

    Returns:
        The events, in time order, 0 <= t < `config.kept_us(duration)`, and the class.

    Raises:
        SourceError: the data set forbids an augmentation that the configuration has.
    """
    config.refuse_forbidden(effects)
    sensor, duration_us = frame
    draws = uniform(*sample, Draw.EVENT_AUGMENT + np.arange(_NUMBERS))
    if draws[_FLIP] < config.horizontal_flip:
        events, label = mirror(events, sensor), effects.mirrored(label)
    if draws[_POLARITY] < config.polarity_swap:
        events = swap_polarity(events)
    if draws[_REVERSAL] < config.time_reversal:
        events, label = reverse_time(events, duration_us), effects.reversed(label)
    if config.shift > 0:
        dy, dx = (
            int(np.floor(draws[_SHIFT + axis] * (2 * most + 1))) - most
            for axis, most in enumerate(round(config.shift * side) for side in sensor)
        )
        events = shift(events, sensor, (dy, dx), config.shift_border)
    if config.time_crop < 1:
        kept = config.kept_us(duration_us)
        start = int(draws[_CROP] * (duration_us - kept + 1))
        events, duration_us = crop_time(events, start, start + kept), kept
    if config.time_jitter_us > 0:
        events = jitter_time(events, config.time_jitter_us, duration_us, sample)
    if config.event_drop:
        events = drop_events(events, (sensor, duration_us), sample)
    return events, label


def mirror(events: EventArrays, sensor: Sensor) -> EventArrays:
    """Exchange left and right: x becomes W - 1 - x."""
    return EventArrays(events.t, np.uint16(sensor[1] - 1) - events.x, events.y, events.p)


def mirror_boxes(boxes: NDArray[np.float64], sensor: Sensor) -> NDArray[np.float64]:
    """Exchange left and right of boxes: x, y (top left), width and height, [n, 4]."""
    mirrored = boxes.copy()
    mirrored[:, 0] = sensor[1] - boxes[:, 0] - boxes[:, 2]
    return mirrored


def swap_polarity(events: EventArrays) -> EventArrays:
    """Exchange ON and OFF."""
    return EventArrays(events.t, events.x, events.y, np.uint8(1) - events.p)


def reverse_time(events: EventArrays, duration_us: int) -> EventArrays:
    """Run time backwards: t becomes duration - 1 - t, the order is reversed, and ON and OFF are exchanged."""
    backwards = swap_polarity(events.select(slice(None, None, -1)))
    return EventArrays(duration_us - 1 - backwards.t, backwards.x, backwards.y, backwards.p)


def shift(events: EventArrays, sensor: Sensor, by: tuple[int, int], border: Literal["wrap", "drop"]) -> EventArrays:
    """Move events by whole pixels.

    Args:
        events: the events.
        sensor: height and width.
        by: pixels down and right; negative is up and left.
        border: whether events that leave the sensor come in at the opposite side ("wrap") or are dropped.
    """
    y, x = (place.astype(np.int64) + way for place, way in zip((events.y, events.x), by, strict=True))
    if border == "wrap":
        return EventArrays(events.t, (x % sensor[1]).astype(np.uint16), (y % sensor[0]).astype(np.uint16), events.p)
    inside = (x >= 0) & (x < sensor[1]) & (y >= 0) & (y < sensor[0])
    moved = EventArrays(events.t, x.astype(np.uint16), y.astype(np.uint16), events.p)
    return moved.select(inside)


def crop_time(events: EventArrays, start_us: int, stop_us: int) -> EventArrays:
    """Keep the events of start <= t < stop, with times from start."""
    kept = events.select((events.t >= start_us) & (events.t < stop_us))
    return EventArrays(kept.t - start_us, kept.x, kept.y, kept.p)


def jitter_time(events: EventArrays, sigma_us: float, duration_us: int, sample: Sample) -> EventArrays:
    """Add Gaussian numbers to the times and sort them again; times stay in 0 <= t < duration, and no event is lost."""
    way, _ = normal(*sample, Draw.EVENT_JITTER + 2 * np.arange(len(events)))
    t = np.clip(events.t + np.rint(sigma_us * way).astype(np.int64), 0, duration_us - 1)
    order = np.argsort(t, kind="stable")
    return EventArrays(t, events.x, events.y, events.p).select(order)


def drop_events(events: EventArrays, frame: tuple[Sensor, int], sample: Sample) -> EventArrays:
    """Drop nothing, an interval of time, a rectangle or random events, each with probability 1/4 (EventDrop).

    Args:
        events: the events.
        frame: the sensor, and the duration in microseconds.
        sample: the numbers of the sample.
    """
    sensor, duration_us = frame
    kind, size, *place = uniform(*sample, Draw.EVENT_AUGMENT + _DROP + np.arange(4)).tolist()
    ratio = float(_DROP_RATIOS[int(size * len(_DROP_RATIOS))])
    if kind < 0.25:
        return events
    if kind < 0.5:
        return drop_interval(events, int(place[0] * (1 - ratio) * duration_us), int(ratio * duration_us))
    if kind < 0.75:
        share = float(_DROP_SIDES[int(size * len(_DROP_SIDES))])
        height, width = (max(1, int(share * side)) for side in sensor)
        top, left = int(place[0] * (sensor[0] - height + 1)), int(place[1] * (sensor[1] - width + 1))
        return drop_area(events, (top, left, height, width))
    return drop_random(events, ratio, sample)


def drop_interval(events: EventArrays, start_us: int, length_us: int) -> EventArrays:
    """Drop the events of start <= t < start + length."""
    return events.select((events.t < start_us) | (events.t >= start_us + length_us))


def drop_area(events: EventArrays, area: tuple[int, int, int, int]) -> EventArrays:
    """Drop the events in a rectangle: its top, left, height and width."""
    top, left, height, width = area
    inside = (events.y >= top) & (events.y < top + height) & (events.x >= left) & (events.x < left + width)
    return events.select(~inside)


def drop_random(events: EventArrays, ratio: float, sample: Sample) -> EventArrays:
    """Drop each event with probability `ratio`, independently."""
    return events.select(uniform(*sample, Draw.EVENT_DROP + np.arange(len(events))) >= ratio)


def kept_slices(slices: int, kept: int, sample: Sample) -> NDArray[np.int64]:
    """Choose the time slices that a training keeps, ascending, [kept]; each set of them is as likely.

    SG ResNet and SEW ResNet keep 12 of the 16 slices of DVS-CIFAR10. With one `sample.number` for a whole batch
    its samples keep the same ones.

    Raises:
        ValueError: not 1 <= kept <= slices.
    """
    if not 1 <= kept <= slices:
        raise ValueError(f"kept is {kept}: expected 1 to {slices}, the number of slices")
    keys = random_bits(*sample, Draw.SLICE_DELETION + np.arange(slices))
    return np.sort(np.argsort(keys, kind="stable")[:kept])


def slice_order(slices: int, order: Literal["shuffled", "reversed"], sample: Sample) -> NDArray[np.int64]:
    """Return the order in which an evaluation shows the time slices of a sample, [slices].

    Args:
        slices: their number.
        order: "shuffled" is one random permutation for each sample, "reversed" shows the last slice first.
        sample: the numbers of the sample; the epoch of an evaluation is 0.
    """
    if order == "reversed":
        return np.arange(slices)[::-1].copy()
    return np.argsort(random_bits(*sample, Draw.SLICE_ORDER + np.arange(slices)), kind="stable")
