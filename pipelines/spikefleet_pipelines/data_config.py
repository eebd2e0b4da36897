"""The data part of a run's config, and how it becomes an open store."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import Progress, check_options, find_source, prepare
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig


def _transform_kind(transform: object) -> str:
    if isinstance(transform, Mapping):
        return str(transform.get("kind", "image"))
    return str(getattr(transform, "kind", "image"))


AnyTransformConfig = Annotated[
    Annotated[TransformConfig, Tag("image")] | Annotated[DetectionTransformConfig, Tag("detection")],
    Discriminator(
        _transform_kind,
        custom_error_type="transform_kind",
        custom_error_message="kind must be 'image' or 'detection'",
    ),
]
"""What `kind` says: "image" (if nothing is said) or "detection"."""


class DataConfig(BaseModel):
    """Which data a run reads, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="name of the data set; `list_sources()` has them")
    root: Path | None = Field(default=None, description="directory of the raw files, or of a store")
    store: str | None = Field(default=None, description="directory or URI of a prepared store")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="options of the source, such as upsample")
    seed: int = Field(default=0, ge=0, lt=2**63, description="chooses the samples that are held out for validation")
    transform: AnyTransformConfig = TransformConfig()
    loader_processes: int = Field(default=0, ge=0, le=256, description="0 loads in the training process")

    @field_validator("source")
    @classmethod
    def _known(cls, name: str) -> str:
        return find_source(name).name

    @field_validator("store")
    @classmethod
    def _no_credentials(cls, store: str | None) -> str | None:
        # The config is logged and goes with every registered model.
        if store is not None and "://" in store and "@" in urlsplit(store).netloc:
            raise ValueError("a URI with credentials would be logged; give them by the environment instead")
        return store

    @model_validator(mode="after")
    def _options_are_known(self) -> Self:
        check_options(find_source(self.source), self.options)
        return self


def open_or_prepare(
    config: DataConfig,
    stores_dir: Path,
    progress: Progress | None = None,
    parallel: int | None = None,
    verify: bool = True,
) -> Store:
    """Open the store of a config; prepare it first if only raw data is there.

    Looked for, in this order: a store at `config.store`; a store at `config.root`; the store that an earlier call left
    in `stores_dir`; raw files at `config.root`, or where the source has them by default. Processes that race here end
    with the same store: each builds its own, and the first one to finish stays.

    Raises:
        StoreError: `config.store` is no store or one of another source, or a shard is corrupt.
        SourceError: there is no data; the sentence says where it was looked for and how to prepare it.
    """
    if config.store is not None:
        return _of_source(Store.open(config.store, verify=verify), config)
    if config.root is not None and Store.is_store(config.root):
        return _of_source(Store.open(config.root, verify=verify), config)
    out = stores_dir / store_name(config)
    if Store.is_store(out):
        return _of_source(Store.open(out, verify=verify), config)
    options: dict[str, Any] = dict(config.options)
    return prepare(config.source, config.root, out, progress=progress, parallel=parallel, seed=config.seed, **options)


def store_name(config: DataConfig) -> str:
    """The directory of a config's store: the source, and a hash of all that makes it another store than the default."""
    options = check_options(find_source(config.source), config.options).model_dump(mode="json", exclude_defaults=True)
    identity: dict[str, JsonValue] = {**options}
    if config.seed:
        identity["seed"] = config.seed
    if config.root is not None:
        identity["root"] = str(config.root.absolute())
    if not identity:
        return config.source
    return f"{config.source}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}"


def _of_source(store: Store, config: DataConfig) -> Store:
    if store.manifest.source != config.source:
        raise StoreError(
            f"{store.location} is a store of source {store.manifest.source!r}, and the config asks for "
            f"{config.source!r}; change data.source or the store."
        )
    return store
