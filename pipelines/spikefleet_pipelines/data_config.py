"""The data section of a run's config, with pydantic alone; `opening.py` opens or prepares its store."""

import hashlib
import json
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from spikefleet_pipelines.sources.registry import check_options, find_source
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.kinds import AnyTransformConfig


class DataConfig(BaseModel):
    """The data that a run reads, and how it reads them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="name of the data set, one of `list_sources()`")
    root: Path | None = Field(default=None, description="directory of the raw files, or of a store")
    store: str | None = Field(default=None, description="directory or URI of a prepared store")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="options of the source, for example upsample"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="selects the samples held out for validation")
    check_content: bool = Field(
        default=False,
        description="compare the raw files with those of the prepared store by content, although names, sizes and "
        "times agree; it reads every file",
    )
    sampling: Literal["every", "balanced"] = Field(
        default="every",
        description="classification: an epoch has every sample once, or as many of each class (n / K): those of rare "
        "classes several times, those of frequent ones in turn",
    )
    transform: AnyTransformConfig = TransformConfig()
    loader_processes: int = Field(
        default=0, ge=0, le=256, description="loader processes; 0 loads in the training process"
    )

    @field_validator("source")
    @classmethod
    def _known(cls, name: str) -> str:
        return find_source(name).name

    @field_validator("store")
    @classmethod
    def _no_credentials(cls, store: str | None) -> str | None:
        # The config is logged and part of every registered model.
        if store is not None and "://" in store and "@" in urlsplit(store).netloc:
            raise ValueError("the URI contains credentials, which would be logged; set them in the environment instead")
        return store

    @model_validator(mode="after")
    def _options_are_known(self) -> Self:
        check_options(find_source(self.source), self.options)
        return self


def store_name(config: DataConfig) -> str:
    """Name the directory of a config's store: the source, and a hash of all options that differ from the defaults."""
    options = check_options(find_source(config.source), config.options).model_dump(mode="json", exclude_defaults=True)
    identity: dict[str, JsonValue] = {**options}
    if config.seed:
        identity["seed"] = config.seed
    if config.root is not None:
        identity["root"] = str(config.root.absolute())
    if not identity:
        return config.source
    return f"{config.source}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}"
