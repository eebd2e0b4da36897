"""The table of transform kinds.

To add a kind, write its two modules and add it to `_BUILT_IN`; other packages call `register_transform_kind`.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig

_BUILT_IN = (
    TransformConfig,
    DetectionTransformConfig,
    EventsTransformConfig,
    EventDetectionTransformConfig,
)
DEFAULT_KIND = "image"

_KINDS: dict[str, type[BatchTransformConfig]] = {}


def register_transform_kind(config: type[BatchTransformConfig]) -> None:
    """Register the config class of a transform by its `kind`; registering the same class again has no effect.

    Raises:
        ValueError: another class has that kind, or the class does not declare its `kind` and `store_task`.
    """
    kind = config.model_fields["kind"].default
    if not isinstance(kind, str) or not kind:
        raise ValueError(f'{config.__qualname__} has no kind; declare kind: Literal["NAME"] = "NAME" in it')
    if getattr(config, "store_task", None) not in ("classification", "detection"):
        raise ValueError(f"{config.__qualname__} has no store_task; set it to 'classification' or 'detection'")
    if (there := _KINDS.setdefault(kind, config)) is not config:
        raise ValueError(
            f"transform kind {kind!r} is already registered by {there.__module__}.{there.__qualname__}; "
            f"give {config.__module__}.{config.__qualname__} another kind"
        )


for _config in _BUILT_IN:
    register_transform_kind(_config)


def transform_kinds(store_task: str | None = None, events: bool | None = None) -> dict[str, type[BatchTransformConfig]]:
    """Return the config class of each kind.

    Args:
        store_task: only kinds that read stores of this task, "classification" or "detection"; None for all.
        events: only kinds that read recordings of events, or only those that read images; None for all.
    """
    return {
        kind: config
        for kind, config in _KINDS.items()
        if store_task in (None, config.store_task) and events in (None, config.reads_events)
    }


def _by_kind(value: object) -> BatchTransformConfig:
    """Validate by the class registered for a value's kind; errors are located at the field, without a union's tag."""
    kind = value.get("kind", DEFAULT_KIND) if isinstance(value, Mapping) else getattr(value, "kind", DEFAULT_KIND)
    config = _KINDS.get(kind) if isinstance(kind, str) else None
    if config is None:
        allowed = " or ".join(map(repr, _KINDS))
        raise PydanticCustomError(
            "transform_kind", "kind is {kind}, expected {allowed}", {"allowed": allowed, "kind": repr(kind)}
        )
    if isinstance(value, Mapping):
        _refuse_unknown_fields(value, config)
    return config.model_validate(value)


def _refuse_unknown_fields(fields: Mapping[Any, Any], config: type[BatchTransformConfig]) -> None:
    """Refuse unknown fields with a hint; pydantic refuses them too, but does not know other kinds and near names."""
    unknown = [name for name in fields if name not in config.model_fields]
    if unknown and config.model_config.get("extra") == "forbid":
        errors = [
            InitErrorDetails(type=_unknown_field(str(name), config), loc=(str(name),), input=fields[name])
            for name in unknown
        ]
        raise ValidationError.from_exception_data(config.__name__, errors)


def _unknown_field(name: str, config: type[BatchTransformConfig]) -> PydanticCustomError:
    owners = [repr(kind) for kind, other in _KINDS.items() if name in other.model_fields]
    near = difflib.get_close_matches(name, config.model_fields, 1, 0.5)
    if owners:
        hint = f"kind {' or '.join(owners)} has it; set kind or remove the field"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"its fields are {', '.join(config.model_fields)}"
    kind = config.model_fields["kind"].default
    return PydanticCustomError(
        "unknown_field", "kind {kind} has no such field; {hint}", {"kind": repr(kind), "hint": hint}
    )


AnyTransformConfig = Annotated[SerializeAsAny[BatchTransformConfig], PlainValidator(_by_kind)]
"""Type of a field that holds the config of any registered transform (default "image") and dumps all its fields."""
