"""The manifest of a store: what the shards hold, and the SHA-256 by which each is known.

Text and hash of a classification store are those of the first version: what detection adds is absent there.
"""

import hashlib
import json
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spikefleet_pipelines.errors import StoreError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


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


class BoxAudit(_Record):
    """What was found in the annotations of one split. Nothing of it is left out of the store."""

    objects: int = Field(ge=0, description="annotations, crowds included")
    objects_per_class: tuple[int, ...] = Field(description="crowds left out, in the order of class_names")
    crowds: int = Field(ge=0, description="boxes around crowds: kept for evaluation, left out of the loss")
    empty_images: int = Field(ge=0, description="images without an annotation")
    no_area: int = Field(ge=0, description="boxes without width or height: left out of the loss")
    beyond_border: int = Field(
        ge=0, description="boxes that reach more than a pixel over the border; batches clip them"
    )
    outside: int = Field(ge=0, description="boxes that lie wholly outside their image: left out of the loss")
    computed_areas: int = Field(default=0, ge=0, description="annotations without an area, which got width * height")


def _is_absent(value: object) -> bool:
    return value is None


class Audit(_Record):
    """What was found when the store was written. Duplicates are images with equal stored bytes."""

    duplicates: int = Field(ge=0, description="images that equal an earlier one, whatever the split")
    cross_split_duplicates: int = Field(ge=0, description="different images that occur in more than one split")
    images_per_class: dict[str, tuple[int, ...]] = Field(description="for each split, in the order of class_names")
    empty_classes: dict[str, tuple[str, ...]] = Field(description="for each split that lacks classes, their names")
    # Left out of the text where they are absent, so that a classification store keeps its hash.
    boxes: dict[str, BoxAudit] | None = Field(
        default=None, exclude_if=_is_absent, description="detection: for each split that has shards of its own"
    )
    same_as: dict[str, str] | None = Field(
        default=None, exclude_if=_is_absent, description="splits that are another split under a second name"
    )


class Manifest(_Record):
    """The contents of `manifest.json`. A later task adds its value to `task` and its columns to the row schema."""

    schema_version: Literal[1] = 1
    source: str
    task: Literal["classification", "detection"] = "classification"
    class_names: tuple[str, ...] = Field(min_length=1)
    category_ids: tuple[int, ...] | None = Field(
        default=None,
        exclude_if=_is_absent,
        validate_default=True,
        description="detection: the id that annotations have for each of class_names; gaps are usual (COCO: 1 to 90)",
    )
    image: ImageFormat
    options: dict[str, JsonValue] = Field(description="what the source was prepared with, its seed included")
    shards: dict[str, tuple[Shard, ...]]
    audit: Audit

    @field_validator("category_ids")
    @classmethod
    def _one_id_for_each_class(cls, ids: tuple[int, ...] | None, fields: ValidationInfo) -> tuple[int, ...] | None:
        task, classes = fields.data.get("task"), len(fields.data.get("class_names", ()))
        if (task == "detection") != (ids is not None):
            raise ValueError(f"a {task} store {'needs' if ids is None else 'has no'} category ids")
        if ids is not None and (len(ids) != classes or len(set(ids)) != classes):
            raise ValueError(f"there are {len(set(ids))} different ids for {classes} classes")
        return ids

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
        raise StoreError(f"{where} is not JSON ({error}); prepare the store again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{where} has schema_version {version!r}; this version of spikefleet reads {SCHEMA_VERSION}. "
            "Prepare the store again, or use the version that wrote it"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{where}: field {field!r} is wrong: {first['msg']}. Prepare the store again") from error
