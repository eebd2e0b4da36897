"""N-Caltech101 (Orchard et al., 2015); `ncaltech101.py` reads it."""

from functools import partial
from operator import eq
from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class NCaltech101Options(SourceOptions):
    """The split, which the data set does not have, and what is stored of a recording."""

    split_rule: Literal["random"] = Field(
        default="random", description="random: test is a fraction of each class, chosen by the seed"
    )
    test: float = Field(default=0.2, gt=0.0, lt=1.0, description="fraction of the recordings of each class for test")
    holdout: float = recordings_holdout_field(0.1)
    task: Literal["classification", "detection"] = Field(
        default="classification",
        exclude_if=partial(eq, "classification"),  # stores of versions without the option keep their hashes
        description="classification: classes; detection: the box of Caltech101_annotations/ too, without the class "
        "BACKGROUND_Google, which has none",
    )


NCALTECH101 = Source(
    name="ncaltech101",
    description="N-Caltech101: Caltech101's images before a camera that makes three saccades, 240x180, with boxes",
    reader="spikefleet_pipelines.sources.ncaltech101:read_ncaltech101",
    options=NCaltech101Options,
    files="Caltech101/<class>/*.bin (or NCALTECH101/Caltech101/, as tonic has it); for task=detection also "
    "Caltech101_annotations/<class>/annotation_*.bin",
    events=True,
)
