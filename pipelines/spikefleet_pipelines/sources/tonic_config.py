"""Any data set of the library tonic; `tonic_sets.py` reads it."""

from pydantic import Field

from spikefleet_pipelines.sources.event_folder_config import SENSOR
from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class TonicOptions(SourceOptions):
    """Which data set, and what it does not say."""

    data_set: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$",
        description="class in tonic.datasets, such as POKERDVS or DVSLip; it must be given",
    )
    download: bool = Field(default=False, description="true: tonic downloads the files that are missing into DIR")
    sensor: str | None = Field(
        default=None, pattern=SENSOR, description="HxW, size of the sensor in pixels, where tonic does not state it"
    )
    test: float = Field(
        default=0.2,
        gt=0.0,
        lt=1.0,
        description="fraction of the recordings of each class for test, where the data set has no test part",
    )
    holdout: float = recordings_holdout_field(0.1)


TONIC = Source(
    name="tonic",
    description="any data set of the library tonic (extra spikefleet[tonic]) with events of pixels and classes",
    reader="spikefleet_pipelines.sources.tonic_sets:read_tonic",
    options=TonicOptions,
    files="the folder that tonic makes, such as POKERDVS/,",
    events=True,
)
