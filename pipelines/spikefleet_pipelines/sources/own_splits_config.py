"""Options of the sources of anybody's images: what is held out of the training images, and which belong together."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.source import SourceOptions

DEFAULT_HOLDOUT = 0.1
"""Fraction of the training images that becomes val, where no val split is given."""

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Names that the folder of a split has, in the layouts that people and their tools use."""


def is_absent(value: object) -> bool:
    """Whether an option is not set; stores do not record it then."""
    return value is None


def check_pattern(pattern: str | None) -> str | None:
    """Return a regular expression. Raises ValueError if it is none."""
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"it is no regular expression ({error}); write for example '^([^_]+)_'") from None
    return pattern


def group_field() -> Any:
    """Declare an option `group`."""
    return Field(
        default=None,
        exclude_if=is_absent,
        description="pattern in the paths of images; those in which it finds the same text stay in one split",
    )


def own_holdout_field() -> Any:
    """Declare an option `holdout` of images that may have splits of their own."""
    return Field(
        default=None,
        ge=0.0,
        lt=1.0,
        exclude_if=is_absent,
        description="fraction of the training images of each class that becomes val; none: "
        f"{DEFAULT_HOLDOUT:g} without a val split, else 0; with a val split that one is then test",
    )


def only_place(root: Path, split: str, there: Sequence[Path]) -> Path | None:
    """The one place of a split, of those that `SPLIT_FOLDERS` allows and that are there; None where none is.

    Raises:
        SourceError: there are two, so that it is not clear which one is meant.
    """
    if len(there) > 1:
        first, second = (path.relative_to(root).as_posix() for path in there[:2])
        raise SourceError(f"{root} has {first} and {second}, which are both {split}; keep one of them")
    return there[0] if there else None


GroupPattern = Annotated[str | None, AfterValidator(check_pattern)]
"""A regular expression, or none."""


class OwnSplits(SourceOptions):
    """Division of the images where the data set does not divide them."""

    holdout: float | None = own_holdout_field()
    group: GroupPattern = group_field()
