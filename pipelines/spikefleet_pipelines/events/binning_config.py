"""Settings of binning: how a window of events becomes frames [T, C, H, W].

A training chooses T with its network, so a transform has a representation, which is everything but the slices.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["count", "binary", "last_polarity", "histogram", "voxel", "time_surface"]

_COUNTS = ("count", "binary")


class RepresentationConfig(BaseModel):
    """Representation of a window of events, and what is done to its frames afterwards, in the order of the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "count"
    by: Literal["number", "time"] = Field(
        default="time", description="slices of the same number of events, or of the same time"
    )
    compat: Literal["spikingjelly"] | None = Field(
        default=None, description="slices of equal time as SpikingJelly computes them; the last takes the remainder"
    )
    bins: int = Field(default=10, ge=1, le=256, description="histogram and voxel: bins in each slice")
    cut: int = Field(default=10, ge=1, le=255, description="histogram: counts above are cut to it")
    tau_us: float = Field(default=50_000.0, gt=0, allow_inf_nan=False, description="time_surface: time constant in us")
    size: tuple[int, int] | None = Field(default=None, description="height and width of the frames; the sensor's")
    resize: Literal["nearest", "area", "bilinear"] = Field(
        default="nearest",
        description="area: sums over blocks of pixels, for whole factors; bilinear is antialiased",
    )
    normalise: Literal["none", "slice_max", "std"] = Field(
        default="none",
        description="slice_max: each slice over its maximum; std: the values of each slice that are not 0 to mean 0 "
        "and standard deviation 1",
    )
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="largest absolute value")
    dtype: Literal["smallest", "int32", "uint8", "float32"] = Field(
        default="smallest", description="smallest: uint8 for counts up to 255, else int32, and float32 for other values"
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.by == "number" and self.kind not in _COUNTS:
            raise ValueError(f"kind {self.kind!r} has slices of equal time; set by to 'time'")
        if self.compat is not None and (self.by != "time" or self.kind not in _COUNTS):
            raise ValueError("compat is for kinds 'count' and 'binary' by time; leave it out")
        if self.size is not None and not all(1 <= side <= 4096 for side in self.size):
            raise ValueError(f"size is {self.size}, expected height and width of 1 to 4096")
        return self

    @property
    def channels(self) -> int:
        """C of the frames."""
        return {"last_polarity": 1, "histogram": 2 * self.bins, "voxel": self.bins}.get(self.kind, 2)

    def frame_shape(self, sensor: tuple[int, int]) -> tuple[int, int, int]:
        """Return [C, H, W] of the frames of a sensor (height, width)."""
        return self.channels, *(self.size or sensor)

    def with_slices(self, slices: int) -> "BinningConfig":
        """Return the settings of binning with T slices.

        Raises:
            ValueError: not 1 <= slices <= 4096.
        """
        return BinningConfig(slices=slices, **self.model_dump())


class BinningConfig(RepresentationConfig):
    """A representation with the number of its slices."""

    slices: int = Field(default=16, ge=1, le=4096, description="T, number of slices")
