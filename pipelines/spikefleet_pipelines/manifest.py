"""The manifest of a store: what the shards hold, and the SHA-256 by which each is known."""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


class StoreError(ValueError):
    """A store, or a part of one, is missing, damaged or not what was asked for."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Arrow IPC file."""

    # No path separators and no leading dot: a manifest from elsewhere cannot name a file outside its store.
    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ImageFormat(_Record):
    """How the image column is stored: uint8 pixels of one fixed shape, or the bytes of an image file."""

    encoding: Literal["raw", "encoded"]
    shape: tuple[int, int, int] | None = Field(default=None, description="[C, H, W]; None where it varies")

    @model_validator(mode="after")
    def _shape_goes_with_raw(self) -> "ImageFormat":
        if (self.encoding == "raw") != (self.shape is not None):
            raise ValueError(f"encoding {self.encoding!r} does not go with shape {self.shape}")
        if self.shape is not None and min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} has a dimension below 1")
        return self


class Audit(_Record):
    """What was found when the store was written. Duplicates are images with equal stored bytes."""

    duplicates: int = Field(ge=0, description="images that equal an earlier one, whatever the split")
    cross_split_duplicates: int = Field(ge=0, description="different images that occur in more than one split")
    images_per_class: dict[str, tuple[int, ...]] = Field(description="for each split, in the order of class_names")
    empty_classes: dict[str, tuple[str, ...]] = Field(description="for each split that lacks classes, their names")


class Manifest(_Record):
    """The contents of `manifest.json`. A later task adds its value to `task` and its columns to the row schema."""

    schema_version: Literal[1] = 1
    source: str
    task: Literal["classification"] = "classification"
    class_names: tuple[str, ...] = Field(min_length=1)
    image: ImageFormat
    options: dict[str, JsonValue] = Field(description="what the source was prepared with, its seed included")
    shards: dict[str, tuple[Shard, ...]]
    audit: Audit

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W], or None where it varies."""
        return self.image.shape

    @property
    def splits(self) -> dict[str, int]:
        """The number of rows of each split."""
        return {name: sum(shard.rows for shard in shards) for name, shards in self.shards.items()}

    @property
    def content_hash(self) -> str:
        """SHA-256 over the manifest, and so, through the shards' hashes, over the whole content."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read a manifest; `where` names it in the error.

    Raises:
        StoreError: it is not JSON, of another schema version, or a field is wrong (named by its path).
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{where} is not JSON ({error}); prepare the store again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{where} has schema_version {version!r}; this version of spikefleet reads {SCHEMA_VERSION}. "
            "Prepare the store again, or use the version that wrote it."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{where}: field {field!r} is wrong: {first['msg']}. Prepare the store again.") from error
