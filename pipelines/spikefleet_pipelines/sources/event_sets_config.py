"""The built-in data sets of a simulated event camera; `event_sets.py` records them."""

from functools import partial
from operator import eq

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions


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
