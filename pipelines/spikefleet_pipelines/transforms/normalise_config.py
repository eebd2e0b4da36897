"""Statistics by which every transform normalises pixels in its last step; `normalise.py` implements it."""

import difflib
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Normalisation(BaseModel):
    """Per-channel statistics of images scaled to [0, 1]: a pixel becomes (pixel / 255 - mean) / std."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...] = Field(default=(0.0,), min_length=1, description="one value per channel, or one for all")
    std: tuple[float, ...] = Field(default=(1.0,), min_length=1, description="one value per channel, or one for all")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std has {len(self.std)}; set equal numbers of values"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, expected values above 0")
        return self


NORMALISATIONS: dict[str, Normalisation] = {
    "none": Normalisation(),
    "digits": Normalisation(mean=(0.3053,), std=(0.3760,)),
    "fashion_mnist": Normalisation(mean=(0.2860,), std=(0.3530,)),
    "cifar10": Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": Normalisation(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "imagenet": Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
"""Statistics of training data; a config may name one of them instead of setting numbers."""


def _named(value: object) -> object:
    if isinstance(value, str):
        if value not in NORMALISATIONS:
            nearest = difflib.get_close_matches(value, NORMALISATIONS, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown normalisation {value!r}, expected one of {', '.join(NORMALISATIONS)}{hint}")
        return NORMALISATIONS[value]
    return value


NamedNormalisation = Annotated[
    Normalisation,
    BeforeValidator(_named),
    Field(description=f"mean and std, or one of {', '.join(NORMALISATIONS)}"),
]
"""Type of a field that holds statistics, or the name of some."""


def check_channels(normalise: Normalisation, channels: int) -> None:
    """Check that the statistics fit the channels of the images.

    Raises:
        ValueError: there is neither one value nor one per channel.
    """
    if len(normalise.mean) not in (1, channels):
        raise ValueError(
            f"normalise.mean has {len(normalise.mean)} values, but the images have {channels} channels; set 1 or "
            f"{channels} values"
        )
