"""The built-in data sets of a simulated event camera; `event_sets.py` records them."""

from functools import partial
from operator import eq
from typing import Annotated, Self

from pydantic import Field, model_validator

from spikefleet_pipelines.sources.source import Source, SourceOptions

_SENSOR_SIDE = 96
_Side = Annotated[int, Field(ge=8, le=48)]
_Speed = Annotated[float, Field(gt=0, le=150)]


class SaccadeScenesOptions(SourceOptions):
    """Number of the scenes, and how their digits move."""

    train: int = Field(default=2000, ge=1, le=1_000_000, description="number of training scenes")
    val: int = Field(default=200, ge=1, le=1_000_000, description="number of scenes for validation")
    test: int = Field(default=200, ge=1, le=1_000_000, description="number of scenes for the test")
    pauses: bool = Field(
        default=False,
        exclude_if=partial(eq, False),  # stores of versions without the option keep their hashes
        description="true: recordings of 1.2 s, in which all digits stop twice for 200 to 400 ms and boxes stay",
    )
    sides: tuple[_Side, _Side] = Field(
        default=(14, 32),
        exclude_if=partial(eq, (14, 32)),
        description="sides of the smallest and the largest digit in pixels",
    )
    speeds: tuple[_Speed, _Speed] = Field(
        default=(20.0, 70.0),
        exclude_if=partial(eq, (20.0, 70.0)),
        description="speeds of the slowest and the fastest digit in pixels a second",
    )
    one_class: bool = Field(
        default=False,
        exclude_if=partial(eq, False),
        description="true: all digits are of one class, `digit`, so that what counts is where they are",
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name, (least, most) in (("sides", self.sides), ("speeds", self.speeds)):
            if least > most:
                raise ValueError(f"{name}={[least, most]}: write the smaller number first")
        moving_s = 0.8 if self.pauses else 0.2
        if self.sides[1] + self.speeds[1] * moving_s > _SENSOR_SIDE:
            raise ValueError(
                f"speeds={list(self.speeds)}: a digit of {self.sides[1]} pixels that moves for {moving_s} s leaves the "
                f"{_SENSOR_SIDE} pixels of the sensor; set speeds of at most "
                f"{(_SENSOR_SIDE - self.sides[1]) / moving_s:g}"
            )
        return self


SACCADES = Source(
    name="saccades",
    description="events of scikit-learn's digits before a camera that makes three saccades, built in",
    reader="spikefleet_pipelines.sources.event_sets:read_saccades",
    events=True,
)
FIRST_DIGIT = Source(
    name="first_digit",
    description="events of two digits, one after the other; the label, the first of them, needs time; built in",
    reader="spikefleet_pipelines.sources.event_sets:read_first_digit",
    events=True,
)
APPARENT_MOTION = Source(
    name="apparent_motion",
    description="events of a digit that flashes at three places; the label, its direction, needs time; built in",
    reader="spikefleet_pipelines.sources.event_sets:read_apparent_motion",
    events=True,
)
SACCADE_SCENES = Source(
    name="saccade_scenes",
    description="events of moving digits with boxes over time, for detection, built in",
    reader="spikefleet_pipelines.sources.event_sets:read_saccade_scenes",
    options=SaccadeScenesOptions,
    events=True,
)
