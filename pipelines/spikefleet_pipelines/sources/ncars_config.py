"""N-CARS (Sironi et al., 2018); `ncars.py` reads it."""

from pydantic import Field

from spikefleet_pipelines.sources.event_folder_config import SENSOR
from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class NCarsOptions(SourceOptions):
    """Validation recordings, and the size that the files do not state; train and test are the data set's own."""

    holdout: float = recordings_holdout_field(0.1)
    sensor: str = Field(
        default="100x120",
        pattern=SENSOR,
        description="HxW in pixels, of the region around a car, which the files do not state",
    )


NCARS = Source(
    name="ncars",
    description="N-CARS: 100 ms of cars and background before a moving camera, 24,029 recordings",
    reader="spikefleet_pipelines.sources.ncars:read_ncars",
    options=NCarsOptions,
    files="n-cars_train/ and n-cars_test/ (or train/ and test/), each with cars/*_td.dat and background/*_td.dat,",
    events=True,
)
