"""The pixels of the simulated event camera obey the laws that are built into them."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from spikefleet_pipelines.events.moving_images import along, enlarge, shifted
from spikefleet_pipelines.events.pixel_model import IDEAL, PixelModel, Reflectance, record, stationary_age, thresholds
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions

SIDE = 96
WAY = np.array([(0.0, 0.0), (25.0, 12.5)])  # down, right
ONE = np.arange(1)


@pytest.fixture(scope="module")
def digit() -> NDArray[np.float32]:
    """A digit of 60 pixels with room to move, at reflectance 0 to 1."""
    images = read_digits(None, DigitsOptions(), 0).splits["train"][0]
    room = np.full((1, 2), 26.0 + 5)
    return enlarge(images[:1, 0], np.array([60.0]), room, (SIDE + 52, SIDE + 52))


def moving(digit: NDArray[np.float32], duration: int, way: NDArray[np.float64] = WAY) -> Reflectance:
    return lambda time: shifted(digit, 26, along(way, time / duration), (SIDE, SIDE))


def recorded(digit: NDArray[np.float32], model: PixelModel, duration: int = 100_000, seed: int = 0) -> EventArrays:
    return record(moving(digit, duration), duration, model, seed, ONE)[0]


def still(model: PixelModel, reflectance: float, seconds: int, side: int = 100) -> EventArrays:
    image = np.full((1, side, side), reflectance, np.float32)
    return record(lambda time: image, seconds * 1_000_000, model, 0, ONE)[0]


def rate(events: EventArrays, seconds: float, side: int = 100) -> float:
    return len(events) / seconds / side**2


def least_gap(events: EventArrays) -> int:
    """Shortest time between two events of one pixel."""
    order = np.lexsort((events.t, events.x, events.y))
    same = (np.diff(events.x[order].astype(int)) == 0) & (np.diff(events.y[order].astype(int)) == 0)
    return int(np.diff(events.t[order])[same].min())


def per_pixel(events: EventArrays, polarity: int) -> NDArray[np.int64]:
    chosen = events.p == polarity
    return np.bincount(events.y[chosen].astype(int) * SIDE + events.x[chosen], minlength=SIDE**2)


def test_a_still_image_sends_nothing_from_ideal_pixels(digit: NDArray[np.float32]) -> None:
    image = shifted(digit, 26, (0, 0), (SIDE, SIDE))
    assert len(record(lambda time: image, 100_000, IDEAL, 0, ONE)[0]) == 0
    nudged = record(lambda time: image * np.float32(1 - 0.5 * (time > 50_000)), 100_000, IDEAL, 0, ONE)[0]
    assert len(nudged) > 1000
    assert nudged.t.min() >= 50_000


@pytest.mark.parametrize(("noise", "dark", "bright"), [(1, 1.0, 0.25), (5, 5.0, 1.25)])
def test_shot_noise_has_its_rate(noise: float, dark: float, bright: float) -> None:
    """20,000 events in the dark: the standard error is 0.7 %, in the light 1.4 %."""
    model = PixelModel(leak_hz=0, noise_hz=noise, step_us=20_000)
    at_dark, at_bright = still(model, 0, 2), still(model, 1, 2)
    assert rate(at_dark, 2) == pytest.approx(dark, rel=0.03)
    assert rate(at_bright, 2) == pytest.approx(bright, rel=0.05)
    assert at_dark.p.mean() == pytest.approx(0.5, abs=0.015)
    counts = np.bincount(at_dark.y.astype(int) * 100 + at_dark.x, minlength=10_000)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.06)  # Poisson


@pytest.mark.parametrize("leak", [0.1, 0.5, 2.0])
def test_the_leak_has_its_rate_and_is_on(leak: float) -> None:
    events = still(PixelModel(leak_hz=leak, noise_hz=0, step_us=10_000), 0.5, 4)
    assert rate(events, 4) == pytest.approx(leak, rel=0.02)
    assert events.p.all()


def test_leak_and_noise_are_stationary_from_the_start() -> None:
    """Expected by renewal theory: 1 + 1 / (e^2 - 1) = 1.157 in every second."""
    model = PixelModel(leak_hz=0.5, noise_hz=1, step_us=10_000)
    events = still(model, 0, 4)
    seconds = np.bincount(events.t // 1_000_000, minlength=4) / 100**2
    assert seconds == pytest.approx([1 + 1 / (np.e**2 - 1)] * 4, rel=0.035)
    # Negative control: pixels that were all reset at the start owe their leak events.
    image = np.zeros((1, 100, 100), np.float32)
    fresh = record(lambda time: image, 1_000_000, model, 0, ONE, start_age_s=np.zeros((1, 100, 100)))[0]
    assert rate(fresh, 1) == pytest.approx(1.0, rel=0.03)


def test_ages_follow_their_law() -> None:
    uniforms = (np.arange(100_000) + 0.5) / 100_000
    ages = stationary_age(uniforms, np.full(100_000, 1.0), 0.5)
    assert 0 <= ages.min() < ages.max() <= 2
    share = (1 - np.exp(-1.0)) / (1 - np.exp(-2.0))
    assert (ages < 1).mean() == pytest.approx(share, abs=1e-4)
    assert np.allclose(stationary_age(uniforms, np.zeros(100_000), 0.5), 2 * uniforms, rtol=1e-6)


def test_twice_the_threshold_gives_less_than_half_of_the_events(digit: NDArray[np.float32]) -> None:
    low, high = (len(recorded(digit, IDEAL.model_copy(update={"theta_on": t, "theta_off": t}))) for t in (0.3, 0.6))
    assert 0.3 * low < high < 0.5 * low


def test_inverted_light_swaps_polarities(digit: NDArray[np.float32]) -> None:
    """Light I becomes dark / I: the logarithm is mirrored about its middle between black and white."""
    dark = IDEAL.dark
    scene = moving(digit, 100_000)

    def inverted(time: int) -> NDArray[np.float32]:
        light = scene(time).astype(np.float64) * (1 - dark) + dark
        return ((dark / light - dark) / (1 - dark)).astype(np.float32)

    one, other = recorded(digit, IDEAL), record(inverted, 100_000, IDEAL, 0, ONE)[0]
    for polarity in (0, 1):
        assert np.array_equal(per_pixel(one, polarity), per_pixel(other, 1 - polarity))
    assert not np.array_equal(per_pixel(one, 0), per_pixel(other, 0))
    keys = [np.lexsort((e.t, e.y, e.x)) for e in (one, other)]
    assert np.abs(one.t[keys[0]] - other.t[keys[1]]).max() <= 5


def test_the_rate_is_proportional_to_the_speed(digit: NDArray[np.float32]) -> None:
    """The same path in other times has the same events, but for what 2 ms between two looks at the light hide."""
    model = IDEAL.model_copy(update={"step_us": 1000})
    counts = [len(recorded(digit, model, duration)) for duration in (50_000, 100_000, 200_000)]
    assert counts == pytest.approx([counts[-1]] * 3, rel=0.01)
    further = record(moving(digit, 100_000, WAY[:, ::1] * 0.5), 100_000, model, 0, ONE)[0]
    assert len(further) < 0.7 * counts[0]


def test_what_comes_first_at_a_pixel_gets_more_events(digit: NDArray[np.float32]) -> None:
    """The reference has hysteresis: a passing bright line sends more ON than OFF, forwards and backwards."""
    forwards = recorded(digit, IDEAL)
    backwards = record(moving(digit, 100_000, WAY[::-1]), 100_000, IDEAL, 0, ONE)[0]
    assert len(backwards) == pytest.approx(len(forwards), rel=0.01)
    shares = [forwards.p.mean(), backwards.p.mean()]
    assert all(0.5 < share < 0.56 for share in shares)
    dark = record(lambda time: 1 - moving(digit, 100_000)(time), 100_000, IDEAL, 0, ONE)[0]
    assert dark.p.mean() < 0.5


def test_a_pixel_rests_after_an_event(digit: NDArray[np.float32]) -> None:
    fast = {"step_us": 1000}
    resting = recorded(digit, IDEAL.model_copy(update=fast | {"refractory_us": 500.0}), 10_000)
    assert 500 <= least_gap(resting) < 1000
    assert least_gap(recorded(digit, IDEAL.model_copy(update=fast), 10_000)) < 500
    noisy = still(PixelModel(noise_hz=500, leak_hz=0), 0, 1, side=10)
    assert least_gap(noisy) >= 500
    assert least_gap(still(PixelModel(noise_hz=500, leak_hz=0, refractory_us=0), 0, 1, side=10)) < 100
    # Dead time: of noise of 500 Hz a pixel that rests 500 us after each event sends 500 / (1 + 500 * 0.0005).
    assert rate(noisy, 1, 10) == pytest.approx(400, rel=0.02)


def test_the_reference_is_set_at_the_end_of_the_rest() -> None:
    """A ramp of light: each event costs a threshold and the rise during the rest."""
    model = IDEAL.model_copy(update={"refractory_us": 10_000.0})

    def ramp(time: int) -> NDArray[np.float32]:
        light = 0.2 * np.exp(10e-6 * time)  # the logarithm rises by 10 a second
        return np.full((1, 1, 1), (light - 0.2) / 0.8, np.float32)

    events = record(ramp, 100_000, model, 0, ONE)[0]
    # Threshold 0.3 after 30 ms, then 10 ms of rest.
    assert events.t == pytest.approx([30_000, 70_000], abs=2)
    assert record(ramp, 100_000, IDEAL, 0, ONE)[0].t == pytest.approx([30_000, 60_000, 90_000], abs=2)


def test_less_bandwidth_gives_fewer_and_later_events(digit: NDArray[np.float32]) -> None:
    models = [IDEAL.model_copy(update={"bandwidth_hz": hz, "bandwidth_floor": 0.1}) for hz in (0.0, 300.0, 100.0, 30.0)]
    every = [recorded(digit, model) for model in models]
    counts, medians = [len(events) for events in every], [float(np.median(events.t)) for events in every]
    assert counts == sorted(counts, reverse=True)
    assert medians == sorted(medians)
    assert counts[3] < 0.85 * counts[0]
    assert medians[3] > medians[0] + 4000


def step_of_light(before: float, after: float) -> Reflectance:
    return lambda time: np.full((1, 1, 1), after if time else before, np.float32)


def test_the_photoreceptor_has_its_time_constant() -> None:
    """A step of light at full reflectance reaches 1 - 1 / e of it after 1 / (2 pi f), in the dark ten times as late."""
    model = IDEAL.model_copy(update={"theta_on": 0.01, "theta_off": 0.01, "bandwidth_hz": 30.0, "step_us": 100})
    for reflectance, before, hz in ((1.0, 0.9, 30), (0.0, 0.1, 3)):
        tau = 1 / (2 * np.pi * hz)
        events = record(step_of_light(before, reflectance), 120_000, model, 0, ONE)[0]
        whole = abs(np.log(0.2 + 0.8 * reflectance) - np.log(0.2 + 0.8 * before))
        # The events are the crossings of 0.01, 0.02 ... of what the voltage still has to go.
        expected = -tau * np.log(1 - 0.01 * np.arange(1, 1 + len(events)) / whole) * 1e6
        assert len(events) >= 8
        assert events.t[: len(events) // 2] == pytest.approx(expected[: len(events) // 2], rel=0.02, abs=60)


def test_the_step_does_not_matter_to_ideal_pixels(digit: NDArray[np.float32]) -> None:
    two, half = (recorded(digit, IDEAL.model_copy(update={"step_us": step})) for step in (2000, 500))
    assert len(two) == pytest.approx(len(half), rel=0.005)
    coarse = recorded(digit, IDEAL.model_copy(update={"step_us": 25_000}))
    assert abs(len(coarse) - len(half)) > 0.05 * len(half)


def test_a_recording_is_a_function_of_its_numbers(digit: NDArray[np.float32]) -> None:
    one, same, other = (recorded(digit, PixelModel(), seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(getattr(one, name), getattr(same, name)) for name in "txyp")
    assert not np.array_equal(one.t, other.t)
    assert (np.diff(one.t) >= 0).all()
    assert 0 <= one.t.min() <= one.t.max() < 100_000
    scene = moving(digit, 100_000)
    batch = record(lambda time: np.repeat(scene(time), 3, 0), 100_000, PixelModel(), 0, np.array([4, 0, 9]))
    assert all(np.array_equal(getattr(one, name), getattr(batch[1], name)) for name in "txyp")
    assert not np.array_equal(batch[0].t, batch[2].t)
    streams = record(scene, 100_000, PixelModel(), 0, ONE, stream=1)[0]
    assert not np.array_equal(one.t, streams.t)
    assert [str(getattr(one, name).dtype) for name in "txyp"] == ["int64", "uint16", "uint16", "uint8"]


def test_thresholds_are_a_pattern_of_the_chip() -> None:
    model = PixelModel(theta_on=0.3, theta_off=0.2, theta_sigma=0.03)
    on, off = thresholds(model, (200, 200))
    assert (on.mean(), off.mean()) == pytest.approx((0.3, 0.2), abs=0.001)
    assert (on.std(), off.std()) == pytest.approx((0.03, 0.03), rel=0.03)
    assert abs(np.corrcoef(on, off)[0, 1]) < 0.02
    assert not np.array_equal(on, thresholds(model.model_copy(update={"sensor_seed": 1}), (200, 200))[0])
    wide, _ = thresholds(PixelModel(theta_sigma=1.0), (200, 200))
    assert wide.min() == np.float32(0.1 * 0.3)


def test_what_does_not_fit_is_refused() -> None:
    image = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="multiple of step_us, 2000"):
        record(lambda time: image, 3000, PixelModel(), 0, ONE)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) for 2 numbers"):
        record(lambda time: image, 4000, PixelModel(), 0, np.arange(2))
    for field in ("theta_on", "theta_off", "dark"):
        with pytest.raises(ValidationError, match=field):
            PixelModel(**{field: 0.0})
