"""Prophesee's Gen1 automotive detection data set (de Tournemire et al., 2020); `gen1.py` reads it."""

from spikefleet_pipelines.sources.source import Source, SourceOptions

GEN1 = Source(
    name="gen1",
    description="Gen1: recordings of traffic by a camera in a car, 304x240, with boxes of cars and pedestrians",
    reader="spikefleet_pipelines.sources.gen1:read_gen1",
    options=SourceOptions,
    files="train/, val/ and test/ with pairs NAME_td.dat and NAME_bbox.npy",
    events=True,
)
