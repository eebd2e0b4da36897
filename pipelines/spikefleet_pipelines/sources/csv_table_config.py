"""Tables of labels: CSV files and lists of images with a class, or with boxes; `csv_table.py` reads them."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from spikefleet_pipelines.sources.own_splits_config import OwnSplits, is_absent
from spikefleet_pipelines.sources.source import Source

COLUMNS = ("path", "label", "split", "group", "x1", "y1", "x2", "y2")
"""What a column can be."""


def _check_columns(columns: str | None) -> str | None:
    for item in [] if columns is None else columns.split(","):
        kind, _, name = item.partition(":")
        if kind not in COLUMNS or not name:
            raise ValueError(f"{item!r} is not of the form KIND:NAME with KIND one of {', '.join(COLUMNS)}")
    return columns


class CsvOptions(OwnSplits):
    """What the tables do not say."""

    table: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="file of the table below the root; none: train.csv, val.csv and test.csv, train/_annotations.csv "
        "and "
        "so on, or the only .csv, .tsv or .txt file",
    )
    columns: Annotated[str | None, AfterValidator(_check_columns)] = Field(
        default=None,
        exclude_if=is_absent,
        description="names of the columns, for example path:image,label:species; none: those that are usual",
    )
    images: str | None = Field(
        default=None, exclude_if=is_absent, description="directory below the root that the paths are relative to"
    )


def plain_name(name: str) -> str:
    """A column's name without case, spaces and signs."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


CSV = Source(
    name="csv",
    description="a table of image paths with a class (path,label[,split][,group]) or with boxes "
    "(path,x1,y1,x2,y2,class, as RetinaNet's)",
    reader="spikefleet_pipelines.sources.csv_table:read_csv",
    options=CsvOptions,
    files="labels.csv (or train.csv, val.csv and test.csv) and the images that it names",
)
