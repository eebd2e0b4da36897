"""Data sets in Pascal VOC's format: an XML file of boxes for each image; `voc.py` reads them."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import OwnSplits
from spikefleet_pipelines.sources.source import Source


class VocOptions(OwnSplits):
    """What the files do not say."""

    first_pixel: Literal[0, 1] = Field(
        default=1, description="number of the first pixel in a row: 1 in Pascal VOC, 0 in the exports of some programs"
    )
    difficult: bool = Field(default=True, description="whether objects that are marked as difficult are kept")


VOC = Source(
    name="voc",
    description="boxes in Pascal VOC's XML files (VOCdevkit, Roboflow, Label Studio, LabelImg)",
    reader="spikefleet_pipelines.sources.voc:read_voc",
    options=VocOptions,
    files="JPEGImages/, Annotations/ and ImageSets/Main/{train,val,test}.txt; or train/, valid/ and test/ with "
    "images and "
    ".xml; or images and .xml alone",
)
