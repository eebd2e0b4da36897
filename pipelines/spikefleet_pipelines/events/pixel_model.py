"""A model of the pixels of an event camera: light in, events out.

Each pixel follows the logarithm of its light through a first-order photoreceptor and compares it with the value that
it memorised at its last reset; where the difference reaches a threshold it sends an event and resets.

* Log intensity and events at interpolated crossings: Rebecq, Gehrig and Scaramuzza, "ESIM: an open event camera
  simulator", CoRL 2018.
* Bandwidth that grows with light, leak, shot noise, threshold mismatch and their constants: Hu, Liu and Delbruck,
  "v2e: from video frames to realistic DVS events", CVPRW 2021.

Deviations: the photoreceptor is an implicit Euler step, stable for any step. The reference is set at the end of the
refractory period, during which the reset switch stays closed; v2e sets it at the event. At the start every pixel has
the age since its last reset that a camera in front of a still scene has on average; equal or uniform ages make the
rates of the first seconds wrong. Not modelled: saturation of the read-out, parasitic light, temperature.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from spikefleet_pipelines.counter_random import Draw, normal, uniform
from spikefleet_pipelines.events.recording import EventArrays, Sensor

_LEAST_THRESHOLD = 0.1  # of the nominal threshold
# A pixel that comes back to where it started reaches its last threshold exactly. Without this allowance, in units of
# log intensity and above what float32 rounds off, rounding would decide whether it sends an event.
_TIE = 2e-6
_NUMBERS_PER_NOISE = 4

Reflectance = Callable[[int], NDArray[np.float32]]
"""What the camera sees at a time in microseconds: values 0 to 1, float32 [B, H, W]."""


class PixelModel(BaseModel):
    """Constants of the pixels, in physical units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta_on: float = Field(default=0.3, gt=0, description="threshold of ON events, in units of log intensity")
    theta_off: float = Field(default=0.3, gt=0, description="threshold of OFF events, in units of log intensity")
    theta_sigma: float = Field(default=0.03, ge=0, description="standard deviation of the thresholds between pixels")
    refractory_us: float = Field(default=500.0, ge=0, description="time for which a pixel is reset after an event")
    bandwidth_hz: float = Field(
        default=300.0, ge=0, description="cutoff of the photoreceptor at full light; 0: unlimited"
    )
    bandwidth_floor: float = Field(default=0.1, ge=0, le=1, description="cutoff in the dark, of that at full light")
    leak_hz: float = Field(default=0.1, ge=0, description="ON events per second of a still pixel by its leak")
    noise_hz: float = Field(default=1.0, ge=0, description="events of shot noise per second of a dark pixel")
    noise_bright: float = Field(default=0.25, ge=0, le=1, description="shot noise at full light, of that in the dark")
    dark: float = Field(default=0.2, gt=0, lt=1, description="light of a black surface, of that of a white one")
    step_us: int = Field(default=2000, ge=1, description="time between two evaluations of the light")
    sensor_seed: int = Field(default=0, description="seed of the thresholds, which every recording shares as in a chip")


DEFAULT = PixelModel()
"""The camera of the built-in data sets."""

IDEAL = PixelModel(theta_sigma=0, refractory_us=0, bandwidth_hz=0, leak_hz=0, noise_hz=0)
"""Pixels without noise, leak, mismatch, refractory period and limit of bandwidth."""


def record(
    reflectance: Reflectance,
    duration_us: int,
    model: PixelModel,
    seed: int,
    index: NDArray[np.int64],
    *,
    stream: int = 0,
    start_age_s: NDArray[np.float64] | None = None,
) -> list[EventArrays]:
    """Record scenes with a camera, each from a freshly reset sensor; recordings do not depend on one another.

    Args:
        reflectance: the scenes at a time, float32 [B, H, W]; called once for each step, in order, from 0.
        duration_us: length of the recordings, a multiple of the model's step.
        model: constants of the pixels.
        seed: of the random numbers.
        index: number of each recording, [B]; with `seed` and `stream` it determines all that is random.
        stream: separates recordings of equal numbers, for example of different splits.
        start_age_s: time since the last reset of each pixel at the start, [B, H, W]; None draws stationary ages.

    Returns:
        For each scene its events in time order, 0 <= t < duration_us.

    Raises:
        ValueError: the duration is no multiple of the step, or the scenes are not one for each index.
    """
    if duration_us <= 0 or duration_us % model.step_us:
        raise ValueError(f"duration_us is {duration_us}: expected a positive multiple of step_us, {model.step_us}")
    first = reflectance(0)
    if first.ndim != 3 or len(first) != len(index):
        raise ValueError(f"the scenes have shape {first.shape} for {len(index)} numbers: expected [B, H, W], one each")
    pixels = _Pixels(first, model, (seed, stream, index), start_age_s)
    noise = _draw_noise(first.shape, duration_us, model, (seed, stream, index))
    for step, candidates in enumerate(noise):
        start = step * model.step_us
        pixels.advance(start, reflectance(start + model.step_us), candidates)
    return pixels.events(duration_us)


@lru_cache(maxsize=8)
def thresholds(model: PixelModel, sensor: Sensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Thresholds of the pixels for ON and for OFF, each [H * W]: a fixed pattern of the chip."""
    draws = Draw.PIXEL_THRESHOLD + 2 * np.arange(sensor[0] * sensor[1])
    pair = []
    for theta, deviation in zip((model.theta_on, model.theta_off), normal(model.sensor_seed, 0, 0, draws), strict=True):
        values = np.maximum(theta + model.theta_sigma * deviation, _LEAST_THRESHOLD * theta).astype(np.float32)
        values.flags.writeable = False
        pair.append(values)
    return pair[0], pair[1]


def stationary_age(uniforms: NDArray[np.float64], noise_hz: NDArray[np.float64], leak_hz: float) -> NDArray[np.float64]:
    """Ages in seconds since the last reset of pixels that have seen a still scene for long.

    Noise resets a pixel at the rate `noise_hz`, the leak 1 / `leak_hz` after the last reset. The density of the age of
    such a renewal process is proportional to exp(-noise_hz * age) up to 1 / `leak_hz`.
    """
    if leak_hz == 0:
        return np.zeros_like(uniforms)  # without leak the reference does not depend on the age
    rate = np.maximum(noise_hz, 1e-9 * leak_hz)
    return -np.log1p(uniforms * np.expm1(-rate / leak_hz)) / rate


_Numbers = tuple[int, int, NDArray[np.int64]]  # seed, stream, index


class _Noise(NamedTuple):
    """Candidates for shot noise within one step, ordered by cell and then by time."""

    time: NDArray[np.float64]
    cell: NDArray[np.int64]
    keep: NDArray[np.float64]
    on: NDArray[np.bool_]

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "_Noise":
        """Return the chosen candidates."""
        return _Noise(self.time[chosen], self.cell[chosen], self.keep[chosen], self.on[chosen])


def _draw_noise(shape: tuple[int, ...], duration_us: int, model: PixelModel, numbers: _Numbers) -> list[_Noise]:
    """Draw a Poisson process at the rate of dark pixels for each recording; candidates of each step, from its start."""
    seed, stream, index = numbers
    count, size = shape[0], shape[1] * shape[2]
    steps = duration_us // model.step_us
    mean = model.noise_hz * size * duration_us * 1e-6
    if mean == 0:
        return [_Noise(np.zeros(0), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))] * steps
    # Ten standard deviations more than on average: no recording is ever short of candidates.
    most = int(mean + 10 * np.sqrt(mean)) + 20
    draws = Draw.PIXEL_NOISE + np.arange(_NUMBERS_PER_NOISE * most)
    values = uniform(seed, stream, index[:, None], draws).reshape(count, most, _NUMBERS_PER_NOISE)
    arrival = np.cumsum(-np.log1p(-values[..., 0]), axis=1) * (duration_us / mean)
    recording, place = np.nonzero(arrival < duration_us)
    time, values = arrival[recording, place], values[recording, place]
    cell = recording * size + (values[:, 1] * size).astype(np.int64)
    step = (time // model.step_us).astype(np.int64)
    order = np.lexsort((time, cell, step)).astype(np.int64)
    every = _Noise(time - step * model.step_us, cell, values[:, 2], values[:, 3] < 0.5).select(order)
    bounds = np.searchsorted(step[order], np.arange(steps + 1)).tolist()
    return [every.select(slice(low, high)) for low, high in pairwise(bounds)]


class _Pixels:
    """State of the pixels of B sensors between steps: [B, H * W], or lists of cells, which are places in that."""

    def __init__(
        self, first: NDArray[np.float32], model: PixelModel, numbers: _Numbers, age: NDArray[np.float64] | None
    ) -> None:
        count, self._height, self._width = first.shape
        self._model = model
        self._size = self._height * self._width
        self._theta_on, self._theta_off = thresholds(model, (self._height, self._width))
        # How far the reference falls in a step.
        self._leak = (model.leak_hz * model.step_us * 1e-6 * self._theta_on).astype(np.float32)
        reflectance = first.reshape(count, -1)
        self._voltage = self._level(reflectance)
        if age is None:
            uniforms = uniform(numbers[0], numbers[1], numbers[2][:, None], Draw.PIXEL_AGE + np.arange(self._size))
            noise = model.noise_hz * self._noise_share(reflectance).astype(np.float64)
            age = stationary_age(uniforms, noise, model.leak_hz)
        self._reference = self._voltage - (self._theta_on * model.leak_hz * age.reshape(count, -1)).astype(np.float32)
        self._closed = np.zeros(0, np.int64)
        self._open_at = np.zeros(0)
        self._found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]] = []

    def advance(self, start: int, reflectance: NDArray[np.float32], noise: _Noise) -> None:
        """Advance by one step, from `start` in microseconds, to a given reflectance."""
        reflectance = reflectance.reshape(self._voltage.shape)
        before, self._voltage = self._voltage, self._filtered(reflectance)
        self._reference -= self._leak
        difference = self._voltage - self._reference
        concerned = (difference >= self._theta_on - _TIE) | (difference <= _TIE - self._theta_off)
        noise = noise.select(noise.keep < self._noise_share(reflectance.reshape(-1)[noise.cell]))
        flat = concerned.reshape(-1)
        flat[self._closed] = True
        flat[noise.cell] = True
        cells = np.flatnonzero(flat)
        if len(cells):
            self._follow(start, cells, before.reshape(-1)[cells], noise)

    def events(self, duration_us: int) -> list[EventArrays]:
        """Return what was recorded, for each of the B sensors."""
        cell, t, on = (np.concatenate(column) for column in zip(*self._found, strict=True)) if self._found else _NOTHING
        recording, place = np.divmod(cell, self._size)
        t = np.minimum(t, duration_us - 1)  # a crossing at the very end of the last step belongs to it
        order = np.argsort(recording * duration_us + t, kind="stable")
        y, x = np.divmod(place[order].astype(np.uint32), self._width)
        every = EventArrays(t[order], x.astype(np.uint16), y.astype(np.uint16), on[order].astype(np.uint8))
        bounds = np.searchsorted(recording[order], np.arange(len(self._voltage) + 1)).tolist()
        return [every.select(slice(low, high)) for low, high in pairwise(bounds)]

    def _level(self, reflectance: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logarithm of the light, rounded from double precision: float32 logarithms differ between processors."""
        dark = self._model.dark
        light = reflectance * np.float32(1 - dark) + np.float32(dark)
        return np.log(light, dtype=np.float64).astype(np.float32)

    def _noise_share(self, reflectance: NDArray[np.float32]) -> NDArray[np.float32]:
        """Shot noise, of that in the dark."""
        return 1 - np.float32(1 - self._model.noise_bright) * reflectance

    def _filtered(self, reflectance: NDArray[np.float32]) -> NDArray[np.float32]:
        """Voltage of the photoreceptors at the end of a step."""
        level, model = self._level(reflectance), self._model
        if model.bandwidth_hz == 0:
            return level
        scale = 2 * np.pi * model.bandwidth_hz * model.step_us * 1e-6
        floor = model.bandwidth_floor
        weight = reflectance * np.float32(scale * (1 - floor)) + np.float32(scale * floor)
        weight /= weight + 1
        level -= self._voltage
        level *= weight
        level += self._voltage
        return level

    def _follow(self, start: int, cells: NDArray[np.int64], low: NDArray[np.float32], noise: _Noise) -> None:
        """Follow cells through a step, event by event; the voltage is linear in time, and rises relative to the leak.

        Args:
            start: of the step.
            cells: those that may send an event, ascending, [n].
            low: their voltage at the start of the step, [n].
            noise: of the step; all its cells are among `cells`.
        """
        step, size = self._model.step_us, self._size
        voltage, reference = self._voltage.reshape(-1), self._reference.reshape(-1)
        leak = self._leak[cells % size].astype(np.float64)
        course = _Course(
            base=low.astype(np.float64),
            slope=(voltage[cells] - low.astype(np.float64) + leak) / step,
            reference=reference[cells] + leak,
            theta_on=self._theta_on[cells % size].astype(np.float64),
            theta_off=self._theta_off[cells % size].astype(np.float64),
            open_at=np.zeros(len(cells)),
        )
        is_closed = np.zeros(len(cells), np.bool_)
        at = np.searchsorted(cells, self._closed)
        is_closed[at], course.open_at[at] = True, self._open_at
        queue = _Queue.of(noise, cells)
        still_closed = []
        live = np.arange(len(cells))
        while len(live):
            stays = is_closed[live] & (course.open_at[live] >= step)
            still_closed.append(live[stays])
            live = live[~stays]
            course.open(live[is_closed[live]])
            is_closed[live] = False
            crossing, rising = course.crossing(live, step)
            from_noise, noise_on = queue.first(live)
            # Noise while the reset switch is closed has no effect.
            lost = from_noise < course.open_at[live]
            time = np.minimum(crossing, from_noise)
            fires = ~lost & (time <= step)
            by_noise = fires & (from_noise < crossing)
            queue.take(live[lost | by_noise])
            on = np.where(by_noise, noise_on, rising)
            fired = live[fires]
            self._found.append((cells[fired], np.floor(start + time[fires]).astype(np.int64), on[fires]))
            course.open_at[fired] = time[fires] + self._model.refractory_us
            is_closed[fired] = True
            quiet = live[~fires & ~lost]
            reference[cells[quiet]] = course.reference[quiet] - leak[quiet]
            live = live[fires | lost]
        waiting = np.concatenate(still_closed)
        self._closed, self._open_at = cells[waiting], course.open_at[waiting] - step


class _Course(NamedTuple):
    """Differences of n cells from their references within a step, in the frame in which the leak is a rise."""

    base: NDArray[np.float64]
    slope: NDArray[np.float64]
    reference: NDArray[np.float64]
    theta_on: NDArray[np.float64]
    theta_off: NDArray[np.float64]
    open_at: NDArray[np.float64]

    def open(self, chosen: NDArray[np.int64]) -> None:
        """Open the reset switch of the chosen: they memorise the voltage of that time."""
        self.reference[chosen] = self.base[chosen] + self.slope[chosen] * self.open_at[chosen]

    def crossing(self, chosen: NDArray[np.int64], step: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Solve for the time of the next crossing, beyond the step if there is none, and whether it is of ON."""
        slope = self.slope[chosen]
        rising = slope > 0
        threshold = np.where(rising, self.theta_on[chosen], -self.theta_off[chosen])
        way = self.reference[chosen] + threshold - self.base[chosen]
        time = np.divide(way, slope, out=np.full(len(chosen), np.inf), where=slope != 0)
        just = np.abs(way - slope * step) <= _TIE
        return np.maximum(np.where(just, np.minimum(time, step), time), self.open_at[chosen]), rising


class _Queue(NamedTuple):
    """Noise of n cells in a step: for each cell the place of its next candidate and of the end of its candidates."""

    time: NDArray[np.float64]
    on: NDArray[np.bool_]
    next: NDArray[np.int64]
    end: NDArray[np.int64]

    @classmethod
    def of(cls, noise: _Noise, cells: NDArray[np.int64]) -> "_Queue":
        """Queue the noise of each cell."""
        low, high = (np.searchsorted(noise.cell, cells, side) for side in ("left", "right"))
        return cls(np.append(noise.time, np.inf), np.append(noise.on, False), low, high)

    def first(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return time, infinite if there is none, and polarity of the next candidate of each chosen cell."""
        place = self.next[chosen]
        return np.where(place < self.end[chosen], self.time[place], np.inf), self.on[place]

    def take(self, chosen: NDArray[np.int64]) -> None:
        """Remove the next candidate of each chosen cell."""
        self.next[chosen] += 1


_NOTHING = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
