"""Data sets in YOLO's format: images, a text file of boxes for each, and `data.yaml`; `yolo.py` reads them."""

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import OwnSplits, is_absent
from spikefleet_pipelines.sources.source import Source


class YoloOptions(OwnSplits):
    """Which file describes the data set."""

    yaml: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="file of classes and splits below the root; none: data.yaml, the only other .yaml file, or "
        "classes.txt, obj.names",
    )


YOLO = Source(
    name="yolo",
    description="boxes or polygons in YOLO's text files, with data.yaml or classes.txt (Ultralytics, Roboflow, CVAT, "
    "Label Studio, Darknet)",
    reader="spikefleet_pipelines.sources.yolo:read_yolo",
    options=YoloOptions,
    files="data.yaml (or classes.txt), images, and for each image a .txt of the same name beside it, or in labels/ "
    "where the image is in images/",
)
