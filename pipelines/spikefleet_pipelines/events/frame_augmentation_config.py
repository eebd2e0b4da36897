"""The config of augmentations of frames of events; `frame_augmentation.py` implements them."""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class NdaLimits(NamedTuple):
    """Greatest sizes of the geometric augmentations of NDA."""

    roll: float
    """Of the side of the frames."""
    rotation: float
    """In degrees."""
    shear: float
    """In degrees."""


NDA_LIMITS = {
    "dvs_cifar10": NdaLimits(roll=5 / 48, rotation=30.0, shear=30.0),
    "ncaltech101": NdaLimits(roll=3 / 48, rotation=15.0, shear=15.0),
}
"""The constants of the released code by data set; it rolls frames of 48x48 by up to 5 and 3 pixels."""


class FrameAugmentation(BaseModel):
    """Which augmentations of frames a training uses, in this order; the default is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nda: Literal["dvs_cifar10", "ncaltech101"] | None = Field(
        default=None,
        description="exactly one of roll, rotation and shear, with NDA's limits for this data set; its horizontal flip "
        "is an option of its own",
    )
    cutout: float = Field(default=0.0, ge=0, le=1, description="side of a square of zeros, of the frames' shorter side")
    cut_mix: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability that a rectangle, in all slices, is that of another recording, whose class gets its "
        "share",
    )

    @property
    def is_none(self) -> bool:
        """Whether frames stay as they are."""
        return self == FrameAugmentation()
