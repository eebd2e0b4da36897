"""Shards of tar in the format of WebDataset; `webdataset.py` reads them."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import OwnSplits, is_absent
from spikefleet_pipelines.sources.source import Source

WEBDATASET_ADVICE = "write the shard anew, or leave the image out with --skip-bad"


class WebDatasetOptions(OwnSplits):
    """What the shards do not say."""

    label: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="key of the class or of the objects in the .json of a sample; none: objects, annotations, label, "
        "cls, class or category",
    )
    boxes: Literal["xywh", "xyxy"] | None = Field(
        default=None, exclude_if=is_absent, description="form of a box in pixels; none: xywh, as COCO's"
    )


WEBDATASET = Source(
    name="webdataset",
    description="tar shards of WebDataset: samples of an image with .cls, .txt (a class) or .json (a class, or "
    "objects)",
    reader="spikefleet_pipelines.sources.webdataset:read_webdataset",
    options=WebDatasetOptions,
    files="train-000000.tar and so on, with 0001.jpg and 0001.cls in it, and maybe classnames.txt beside them",
)
