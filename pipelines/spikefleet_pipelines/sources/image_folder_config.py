"""Data sets in ImageNet's layout: root/train/<class>/*.jpg and root/val/<class>/*.jpg, or root/<class>/*.jpg alone.

`image_folder.py` reads it.
"""

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import DEFAULT_HOLDOUT, GroupPattern, group_field, is_absent
from spikefleet_pipelines.sources.source import Source, SourceOptions

HELD_OUT_WITH_TEST = 0.02
"""Fraction of the training images of each class that becomes val, where there is a val or a test folder."""


class ImageFolderOptions(SourceOptions):
    """Validation images."""

    holdout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        exclude_if=is_absent,
        description="fraction of the training images of each class that becomes val; 0: train on all of them; none: "
        f"{HELD_OUT_WITH_TEST:g} with a val or a test folder, {DEFAULT_HOLDOUT:g} without",
    )
    group: GroupPattern = group_field()


IMAGE_FOLDER = Source(
    name="image_folder",
    description="image files in ImageNet's layout: train/<class>/, val/<class>/ and maybe test/<class>/, or <class>/ "
    "alone",
    reader="spikefleet_pipelines.sources.image_folder:read_image_folder",
    options=ImageFolderOptions,
    files="train/<class>/*.jpg, val/<class>/*.jpg and, if there is one, test/<class>/*.jpg, or <class>/*.jpg alone "
    "(also .png, .webp, .gif, .bmp, .tif)",
)
