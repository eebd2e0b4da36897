"""What a network's data was like, in few numbers: the reference that later data is compared with.

`reference_measurement.py` measures it; this file holds its parts and reads and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json

REFERENCE = "reference.json"
"""File name of a reference in a registered version."""

CALIBRATION_BINS = 15
"""Bins of confidence, as in Guo et al., ICML 2017."""

_VERSION: Literal[1] = 1

EDGES: Mapping[str, NDArray[np.float64]] = {
    "brightness": np.linspace(0, 1, 101),
    "contrast": np.linspace(0, 0.5, 101),
    "image width": np.exp2(np.arange(8 * 14 + 1) / 8),
    "image height": np.exp2(np.arange(8 * 14 + 1) / 8),
    "objects per image": np.linspace(-0.5, 100.5, 102),
    "object area": np.logspace(-6, 0, 61),
}
"""Of the bins of each property; the outer bins hold what is beyond them too.

Brightness is the mean of all values of an image, white being 1; contrast the standard deviation of its pixels' means
over channels; sizes are in pixels; an object's area is its share of the image.
"""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distribution(_Record):
    """A property of images or objects."""

    counts: tuple[NonNegativeInt, ...] = Field(description="in the bins of EDGES")
    mean: float

    @classmethod
    def of(cls, name: str, values: NDArray[np.float64]) -> Self:
        """The distribution of values, at least one."""
        edges = EDGES[name]
        bins = np.searchsorted(edges[1:-1], values, side="right")
        counts = np.bincount(bins, minlength=len(edges) - 1)
        return cls(counts=tuple(counts.tolist()), mean=float(values.mean()))


class Spread(_Record):
    """Mean and standard deviation over images."""

    mean: float
    std: float = Field(ge=0)

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> Self:
        """Those of values, at least one."""
        one = np.asarray(values, np.float64)
        return cls(mean=float(one.mean()), std=float(one.std(ddof=1)) if len(one) > 1 else 0.0)


class LayerRate(_Record):
    """The firing rate of a spiking layer, as a fraction of the most that it can emit."""

    layer: str
    rate: Spread


class Calibration(_Record):
    """Answers of a network by confidence, in equal bins from 0 to 1."""

    counts: tuple[NonNegativeInt, ...] = Field(min_length=CALIBRATION_BINS, max_length=CALIBRATION_BINS)
    confidence: tuple[float, ...] = Field(
        min_length=CALIBRATION_BINS, max_length=CALIBRATION_BINS, description="sums of the answers' confidence"
    )
    right: tuple[NonNegativeInt, ...] = Field(min_length=CALIBRATION_BINS, max_length=CALIBRATION_BINS)

    @classmethod
    def of(cls, answers: Iterable[tuple[float, bool]]) -> Self:
        """Counts (confidence in [0, 1], whether it is right) of each answer; NaN counts as no confidence."""
        pairs = np.nan_to_num(np.array(list(answers), np.float64).reshape(-1, 2))
        bins = np.minimum((pairs[:, 0] * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        counts, confidence, right = (
            np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, pairs[:, 0], pairs[:, 1])
        )
        return cls(
            counts=tuple(map(int, counts)), confidence=tuple(map(float, confidence)), right=tuple(map(int, right))
        )


class NetworkReference(_Record):
    """A network on a sample of the images."""

    weights: str = Field(description="SHA-256 over its state")
    images: NonNegativeInt
    layers: tuple[LayerRate, ...] = Field(description="in network order")
    energy: Spread | None = Field(description="in mJ for an image")
    energy_images: NonNegativeInt
    calibration: Calibration | None


class DriftReference(_Record):
    """What a split of a data set is like, and what a network does on it."""

    version: Literal[1] = _VERSION
    dataset: str
    content_hash: str = Field(description="SHA-256 over the content of the store")
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None = Field(description="[C, H, W]; None where sizes vary")
    split: str = ""
    images: NonNegativeInt = Field(default=0, description="of the split; 0 where only a summary is known")
    sampled: NonNegativeInt = 0
    seed: int = 0
    class_counts: tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="images of each class; for detection objects without crowds"
    )
    distributions: dict[str, Distribution] = Field(default_factory=dict)
    network: NetworkReference | None = None
    notes: tuple[str, ...] = Field(default=(), description="what could not be measured, and why")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.class_counts is not None and len(self.class_counts) != len(self.class_names):
            raise ValueError(f"found {len(self.class_counts)} class_counts for {len(self.class_names)} classes")
        for name, one in self.distributions.items():
            if name not in EDGES or len(one.counts) != len(EDGES[name]) - 1 or not sum(one.counts):
                raise ValueError(f"distribution {name!r} is unknown, empty, or has another number of bins")
        return self

    @classmethod
    def of_summary(cls, data: DataSummary) -> Self:
        """All that is known where the store is gone: the names of classes and the size of images."""
        return cls(
            dataset=data.dataset,
            content_hash=data.content_hash,
            class_names=data.class_names,
            image_shape=data.image_shape,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], where: str = "the reference") -> Self:
        """Reads what `to_json` returned. Raises UserError if it is damaged, or of another version."""
        if plain.get("version") != _VERSION:
            raise UserError(
                f"{where} has version {plain.get('version')!r}, expected {_VERSION}; measure the reference again"
            )
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise UserError(f"{where} is damaged: {field}: {first['msg']}; measure the reference again") from None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `reference.json` of a folder. Raises UserError if it is missing or damaged."""
        return cls.from_json(read_json_object(folder / REFERENCE), str(folder / REFERENCE))

    def write(self, folder: Path) -> None:
        """Writes `reference.json` into a folder, atomically. Raises OSError."""
        write_json(folder / REFERENCE, self.to_json())
