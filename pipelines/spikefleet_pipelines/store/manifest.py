"""The manifest of a store: its contents, and the SHA-256 of each shard.

Text and hash of a classification store are those of the first version: the fields of detection and of events are absent
there.
"""

import hashlib
import json
import math
from typing import Literal, Self, TypeGuard

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
from spikefleet_pipelines.store.data_set_name import is_data_set_name
from spikefleet_pipelines.store.event_format import EventAudit, EventFormat

SCHEMA_VERSION = 1
_MOST = 1 << 62
"""Bound of all numbers: what numpy and Arrow take."""
MANIFEST_NAME = "manifest.json"


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be stored: not empty, without halves of surrogate pairs."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Arrow IPC file."""

    # No path separators and no leading dot: a manifest from elsewhere cannot name a file outside its store.
    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
    rows: int = Field(ge=1, le=_MOST)
    bytes: int = Field(ge=1, le=_MOST)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ImageFormat(_Record):
    """Format of the image column: uint8 pixels of one fixed shape, or the bytes of image files."""

    encoding: Literal["raw", "encoded"]
    shape: tuple[int, int, int] | None = Field(default=None, description="[C, H, W]; None where it varies")

    @model_validator(mode="after")
    def _shape_goes_with_raw(self) -> Self:
        if (self.encoding == "raw") != (self.shape is not None):
            raise ValueError(
                f"encoding {self.encoding!r} does not fit shape {self.shape}; only raw images have a shape"
            )
        if self.shape is not None and (min(self.shape) < 1 or math.prod(self.shape) >= 1 << 31):
            raise ValueError(f"shape is {self.shape}, expected dimensions of at least 1, and fewer than 2^31 values")
        return self


class BoxAudit(_Record):
    """Statistics of the annotations of one split; the store contains all of them."""

    objects: int = Field(ge=0, description="annotations, crowds included")
    objects_per_class: tuple[int, ...] = Field(description="without crowds, in the order of class_names")
    crowds: int = Field(ge=0, description="boxes around crowds: kept for evaluation, left out of the loss")
    empty_images: int = Field(ge=0, description="images without an annotation")
    no_area: int = Field(ge=0, description="boxes without width or height: left out of the loss")
    beyond_border: int = Field(
        ge=0, description="boxes that extend more than a pixel over the border; batches clip them"
    )
    outside: int = Field(ge=0, description="boxes entirely outside their image: left out of the loss")
    computed_areas: int = Field(default=0, ge=0, description="annotations without an area, set to width * height")


def _is_absent(value: object) -> bool:
    return value is None


class SkippedFile(_Record):
    """A file that could not be read and was left out, as was asked for."""

    split: str
    file: str
    reason: str


class Audit(_Record):
    """Statistics of the store when it was written; duplicates are images with equal stored bytes."""

    # A store of events counts recordings as a store of images counts images; with boxes, the frames that show a class.
    duplicates: int = Field(ge=0, description="images that equal an earlier one, in any split")
    cross_split_duplicates: int = Field(ge=0, description="different images that occur in more than one split")
    images_per_class: dict[str, tuple[int, ...]] = Field(description="for each split, in the order of class_names")
    empty_classes: dict[str, tuple[str, ...]] = Field(description="names of missing classes, for each split with any")
    # Left out of the text where they are absent, so that a classification store keeps its hash.
    boxes: dict[str, BoxAudit] | None = Field(
        default=None, exclude_if=_is_absent, description="detection: for each split that has its own shards"
    )
    events: dict[str, EventAudit] | None = Field(
        default=None, exclude_if=_is_absent, description="events: for each split that has its own shards"
    )
    same_as: dict[str, str] | None = Field(
        default=None, exclude_if=_is_absent, description="splits that are aliases of another split"
    )
    unused: dict[str, int] | None = Field(
        default=None, exclude_if=_is_absent, description="number of what the source has and does not use, by reason"
    )
    skipped: tuple[SkippedFile, ...] | None = Field(
        default=None, exclude_if=_is_absent, description="damaged or missing files that were left out"
    )


class Manifest(_Record):
    """The contents of `manifest.json`; a new task adds its value to `task` and its columns to the row schema."""

    schema_version: Literal[1] = 1
    source: str
    name: str | None = Field(
        default=None, exclude_if=_is_absent, description="name of the data set; absent in stores of earlier versions"
    )
    task: Literal["classification", "detection"] = "classification"
    class_names: tuple[str, ...] = Field(min_length=1)
    category_ids: tuple[int, ...] | None = Field(
        default=None,
        exclude_if=_is_absent,
        validate_default=True,
        description="detection: the id that annotations have for each of class_names; gaps are usual (COCO: 1 to 90)",
    )
    image: ImageFormat | None = Field(
        default=None, exclude_if=_is_absent, description="format of the images; absent in a store of events"
    )
    events: EventFormat | None = Field(
        default=None,
        exclude_if=_is_absent,
        description="format of the events; a row is then a recording, with a label or with frames of boxes",
    )
    options: dict[str, JsonValue] = Field(description="options that the source was prepared with, and its seed")
    shards: dict[str, tuple[Shard, ...]]
    audit: Audit

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str | None) -> str | None:
        if name is not None and not is_data_set_name(name):
            raise ValueError(f"{name[:100]!r} is no name of a data set")
        return name

    @field_validator("class_names")
    @classmethod
    def _is_unicode(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for position, name in enumerate(names):
            if not is_text(name):
                raise ValueError(f"name {position} is {name!r}, expected Unicode text")
        return names

    @model_validator(mode="after")
    def _images_or_events(self) -> Self:
        if (self.image is None) == (self.events is None):
            raise ValueError("a store has either the field image or the field events")
        return self

    @model_validator(mode="after")
    def _audit_of_each_split(self) -> Self:
        for split in set(self.shards) - set(self.audit.same_as or ()):
            if split not in self.audit.images_per_class:
                raise ValueError(f"audit.images_per_class lacks split {split!r}")
            if self.task == "detection" and split not in (self.audit.boxes or {}):
                raise ValueError(f"audit.boxes lacks split {split!r}")
            if self.events is not None and split not in (self.audit.events or {}):
                raise ValueError(f"audit.events lacks split {split!r}")
        return self

    @field_validator("category_ids")
    @classmethod
    def _one_id_for_each_class(cls, ids: tuple[int, ...] | None, fields: ValidationInfo) -> tuple[int, ...] | None:
        task, classes = fields.data.get("task"), len(fields.data.get("class_names", ()))
        if (task == "detection") != (ids is not None):
            raise ValueError(f"a {task} store {'needs' if ids is None else 'must not have'} category ids")
        if ids is not None and not all(-_MOST <= number <= _MOST for number in ids):
            raise ValueError(f"a category id is beyond {_MOST}")
        if ids is not None and (len(ids) != classes or len(set(ids)) != classes):
            raise ValueError(f"found {len(set(ids))} different ids, expected one for each of {classes} classes")
        return ids

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W], or None where it varies, and in a store of events."""
        return None if self.image is None else self.image.shape

    @property
    def image_format(self) -> ImageFormat:
        """Format of the images.

        Raises:
            StoreError: the store holds events.
        """
        if self.image is None:
            raise StoreError(
                f"the store of {self.source} holds recordings of events, not images; choose a store of images"
            )
        return self.image

    def original(self, split: str) -> str:
        """The split whose images a split has: itself, or the one that it is an alias of."""
        return (self.audit.same_as or {}).get(split, split)

    @property
    def splits(self) -> dict[str, int]:
        """The number of rows of each split."""
        return {name: sum(shard.rows for shard in shards) for name, shards in self.shards.items()}

    @property
    def own_images(self) -> int:
        """The number of images of all splits that are no alias, with those that were left out as damaged."""
        aliases = self.audit.same_as or {}
        return sum(rows for split, rows in self.splits.items() if split not in aliases) + len(self.audit.skipped or ())

    @property
    def content_hash(self) -> str:
        """SHA-256 over the manifest and thus, through the shards' hashes, over the whole content.

        The name, and what is not in the store, such as a hidden file beside the images, do not change it.
        """
        content = self.model_dump(mode="json", exclude={"name": True, "audit": {"unused", "skipped"}})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Serialise to the text of `manifest.json`."""
        return self.model_dump_json(indent=2) + "\n"


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse a manifest.

    Args:
        text: content of the file.
        where: path or URI of the file, for error messages.

    Raises:
        StoreError: the text is not JSON, has another schema version, or a field (named by its path) is invalid.
    """
    try:
        content = json.loads(text.decode())  # of bytes, json also takes halves of surrogates
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not JSON ({error}); prepare the store again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{where}: schema_version is {version!r}, expected {SCHEMA_VERSION}; prepare the store again, or use the "
            "version of spikefleet that wrote it"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{where}: field {field!r} is invalid: {first['msg']}; prepare the store again") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()  # of text, json takes halves of surrogates escaped
    except UnicodeEncodeError as error:
        raise StoreError(f"{where} has text that is not Unicode ({error}); prepare the store again") from error
    return manifest
