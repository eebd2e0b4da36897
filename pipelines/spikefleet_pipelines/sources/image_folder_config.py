"""Data sets in ImageNet's layout: root/train/<class>/*.jpg and root/val/<class>/*.jpg.

`image_folder.py` reads it.
"""

from spikefleet_pipelines.sources.source import Source, SourceOptions, holdout_field


class ImageFolderOptions(SourceOptions):
    """Validation images."""

    holdout: float = holdout_field(0.02)


IMAGE_FOLDER = Source(
    name="image_folder",
    description="image files in ImageNet's layout: train/<class>/, val/<class>/ and maybe test/<class>/",
    reader="spikefleet_pipelines.sources.image_folder:read_image_folder",
    options=ImageFolderOptions,
    files="train/<class>/*.jpg, val/<class>/*.jpg and, if there is one, test/<class>/*.jpg (also .png, .webp, .gif, "
    ".bmp, .tif)",
)
