"""What a served network of events takes: events as lists, or frames that were counted elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikefleet.errors import UserError

if TYPE_CHECKING:
    from spikefleet_pipelines.events.recording import Sensor
    from spikefleet_pipelines.loading import Batch
    from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig

EXPECTED = (
    "a list of windows, each an object with lists of integers t (us from the start of the window, not falling), x, y "
    "and p (1: ON, 0: OFF), height and width of the sensor, and, if the window ends after its last event, its duration "
    "(us); or frames [T, C, H, W] in the representation that the network was trained with"
)
"""What a served network expects; stands in the description and the metadata of a registered version."""

_FIELDS = ("t", "x", "y", "p")
_OPTIONAL = ("height", "width", "duration")
_MOST_EVENTS = 1 << 26
_LONGEST_US = 3_600_000_000
"""One hour: the index of a window takes memory with its length."""


def batches(given: Any, sensor: Sensor, transform: EventFramesConfig) -> Iterator[Batch]:
    """Iterates over the windows of a request, one at a time.

    Args:
        given: a list or an array of objects or of nested lists.
        sensor: height and width that the network was trained with.
        transform: for the time steps of the network.

    Raises:
        UserError: a window is in no such form; the message names it.
    """
    from spikefleet_pipelines.events_in_memory import frame_batch, part_of, recording_batch

    if not isinstance(given, list | np.ndarray) or not len(given):
        raise UserError(f"found {_named(given)}; expected {EXPECTED}")
    for position, one in enumerate(given):
        try:
            if isinstance(one, Mapping):
                events, duration = _events(one, sensor)
                yield recording_batch([part_of(events, sensor, 0, duration)], transform)
            else:
                yield frame_batch(_frames(one)[None], sensor, transform)
        except ValueError as error:
            raise UserError(f"window {position}: {error}; expected {EXPECTED}") from None


def example(sensor: Sensor) -> list[dict[str, Any]]:
    """An example request: one window with four events in the corners of the sensor."""
    height, width = sensor
    return [
        {
            "t": [0, 1000, 2000, 3000],
            "x": [0, width - 1, 0, width - 1],
            "y": [0, 0, height - 1, height - 1],
            "p": [0, 1, 1, 0],
            "height": height,
            "width": width,
            "duration": 4000,
        }
    ]


def _events(window: Mapping[str, Any], sensor: Sensor) -> tuple[Any, int]:
    from spikefleet_pipelines.events.recording import EventArrays

    if unknown := [str(name)[:40] for name in window if name not in (*_FIELDS, *_OPTIONAL)]:
        raise ValueError(f"unknown field {unknown[0]!r}")
    if missing := [name for name in _FIELDS if name not in window]:
        raise ValueError(f"field {missing[0]!r} is missing")
    size = tuple(_whole(window.get(name, side), name) for name, side in zip(("height", "width"), sensor, strict=True))
    if size != tuple(sensor):
        raise ValueError(f"sensor is {size[0]} x {size[1]}, but the network was trained on {sensor[0]} x {sensor[1]}")
    t, x, y, p = (_integers(window[name], name) for name in _FIELDS)
    if len({len(t), len(x), len(y), len(p)}) > 1:
        raise ValueError(f"t, x, y and p have {len(t)}, {len(x)}, {len(y)} and {len(p)} values, expected equal numbers")
    for name, values, bound in (("x", x, sensor[1]), ("y", y, sensor[0]), ("p", p, 2)):
        if len(values) and (values.min() < 0 or values.max() >= bound):
            raise ValueError(f"{name} is {values.min()} to {values.max()}, expected 0 to {bound - 1}")
    if (np.diff(t) < 0).any() or (len(t) and t[0] < 0):
        raise ValueError("t falls or is negative")
    last = int(t[-1]) if len(t) else 0
    if last >= _LONGEST_US:
        raise ValueError(f"the last t is {last:,} us, expected less than an hour; count from the start of the window")
    duration = _whole(window.get("duration", last + 1), "duration")
    if not last < duration <= _LONGEST_US:
        raise ValueError(
            f"duration is {duration!r:.40} us, expected more than the last t, {last}, and at most an hour, "
            f"{_LONGEST_US:,} us"
        )
    return EventArrays(t, x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8)), duration


def _integers(values: Any, name: str) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} is no list of integers")
    if len(array) > _MOST_EVENTS:
        raise ValueError(f"{name} has {len(array):,} values, expected at most {_MOST_EVENTS:,}")
    return array.astype(np.int64)


def _whole(value: Any, name: str) -> int:
    plain = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value  # as MLflow hands it on
    if isinstance(plain, bool) or not isinstance(plain, int | np.integer):
        raise ValueError(f"{name} is {plain!r:.40}, expected an integer")
    return int(plain)


def _frames(one: Any) -> NDArray[np.float32]:
    try:
        frames = np.asarray(one.tolist() if isinstance(one, np.ndarray) else one)
    except ValueError:
        raise ValueError("frames have rows of different lengths") from None
    numbers = np.issubdtype(frames.dtype, np.floating) or np.issubdtype(frames.dtype, np.integer)
    if frames.ndim != 4 or not numbers or (np.abs(frames) > np.finfo(np.float32).max).any() or np.isnan(frames).any():
        raise ValueError(
            f"found {frames.dtype} of shape {list(frames.shape)}, expected finite numbers of 32 bits [T, C, H, W]"
        )
    return frames.astype(np.float32)


def _named(given: Any) -> str:
    return "no window" if isinstance(given, list | np.ndarray) else type(given).__name__
