"""Folders of Parquet files with images, as the library `datasets` writes them; `parquet_images.py` reads them."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import OwnSplits, is_absent
from spikefleet_pipelines.sources.source import Source

PARQUET_ADVICE = "replace the file, or leave the image out with --skip-bad"


class ParquetOptions(OwnSplits):
    """What the schema does not say."""

    image: str | None = Field(
        default=None, exclude_if=is_absent, description="column of the images; none: the only one, or image, img"
    )
    label: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="column of the classes, or of the objects; none: objects, the only ClassLabel, or label, labels",
    )
    boxes: Literal["xywh", "xyxy"] | None = Field(
        default=None, exclude_if=is_absent, description="form of a box in pixels; none: xywh, as COCO's"
    )


PARQUET = Source(
    name="parquet",
    description="Parquet files of the library `datasets` (Hugging Face): a column of images with a class or with "
    "objects",
    reader="spikefleet_pipelines.sources.parquet_images:read_parquet",
    options=ParquetOptions,
    files="train-00000-of-00001.parquet and so on, in DIR or DIR/data, or train/*.parquet",
)
