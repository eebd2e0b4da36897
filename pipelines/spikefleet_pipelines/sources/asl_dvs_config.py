"""ASL-DVS (Bi et al., 2019); `asl_dvs.py` reads it."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class AslDvsOptions(SourceOptions):
    """The split, which the data set does not have."""

    split_rule: Literal["random"] = Field(
        default="random", description="random: test is a fraction of each class, chosen by the seed"
    )
    test: float = Field(default=0.2, gt=0.0, lt=1.0, description="fraction of the recordings of each class for test")
    holdout: float = recordings_holdout_field(0.1)


ASL_DVS = Source(
    name="asl_dvs",
    description="ASL-DVS: 24 letters of the American sign language, 240x180, 100,800 recordings",
    reader="spikefleet_pipelines.sources.asl_dvs:read_asl_dvs",
    options=AslDvsOptions,
    files="a/*.mat to y/*.mat, a folder for each letter without j and z (or ASLDVS/ with them, as tonic has it),",
    events=True,
)
