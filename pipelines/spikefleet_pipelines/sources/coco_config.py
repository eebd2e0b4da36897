"""Options of data sets in COCO's format (Lin et al., "Microsoft COCO", 2014); `coco.py` reads them."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions

SplitName = Literal["train", "val", "test"]


class CocoOptions(SourceOptions):
    """Paths of the parts below the root; the defaults are the layout of the COCO 2017 archives."""

    train_images: str = Field(default="train2017", description="directory of the training images")
    train_annotations: str = Field(default="annotations/instances_train2017.json", description="JSON of their boxes")
    val_images: str = Field(default="val2017", description="directory of the images for validation")
    val_annotations: str = Field(default="annotations/instances_val2017.json", description="JSON of their boxes")
    test_images: str | None = Field(default=None, description="directory of the images for the test; null: as val")
    test_annotations: str | None = Field(default=None, description="JSON of their boxes")
    holdout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="fraction of the training images that becomes val; the given val is then test",
    )


class CocoSplitOptions(SourceOptions):
    """Files of a single split."""

    images: Path = Field(description="directory of the images")
    annotations: Path = Field(description="JSON of their boxes")
    split: SplitName = Field(description="name of the split: train, val or test")
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0, description="train: fraction that becomes val")


COCO = Source(
    name="coco",
    description="COCO 2017, or any data set in its format: JSON files of boxes and directories of images",
    reader="spikefleet_pipelines.sources.coco:read_coco",
    options=CocoOptions,
    files="train2017/, val2017/ and annotations/instances_{train,val}2017.json (other names by options)",
    split_writer="spikefleet_pipelines.sources.coco:prepare_coco_split",
    split_options=CocoSplitOptions,
)
