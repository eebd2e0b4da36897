"""The families of networks by name, and their named members.

A member is one published network; other fields are overridden:
`model_config("sg_resnet18", num_classes=100, timesteps=2)`. `register_family` adds a family of another package, which
is then validated, built and deployed like the built-in ones.
"""

import difflib
import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import PlainValidator, SerializeAsAny, ValidationInfo
from pydantic_core import PydanticCustomError

from spikefleet_models.family import ModelConfig
from spikefleet_models.retinanet_config import RetinaNetConfig
from spikefleet_models.seven_b_net_config import SevenBNetConfig
from spikefleet_models.sg_resnet_config import SGResNetConfig
from spikefleet_models.small_event_net_config import SmallEventNetConfig
from spikefleet_models.spike_yolo.config import SpikeYoloConfig, SpikingYoloV8Config

if TYPE_CHECKING:
    from torch import nn

_BUILT_IN: tuple[type[ModelConfig], ...] = (
    SGResNetConfig,
    SpikeYoloConfig,
    SpikingYoloV8Config,
    RetinaNetConfig,
    SevenBNetConfig,
    SmallEventNetConfig,
)
DEFAULT_FAMILY = "sg_resnet"
_ANSWERS = ("timesteps", "in_channels", "num_classes")

_families: dict[str, type[ModelConfig]] = {}

_Family = TypeVar("_Family", bound=type[ModelConfig])


def register_family(config_class: _Family) -> _Family:
    """Register a family; usable as a decorator of its configuration. Registering the same class again has no effect.

    Args:
        config_class: a `ModelConfig` with a default for `family`, a `task`, and `timesteps`, `in_channels` and
            `num_classes`.

    Returns:
        `config_class`.

    Raises:
        ValueError: the class lacks one of these, or its family or the name of one of its members is taken.
    """
    name = _family_of(config_class)
    if _families.get(name) is config_class:
        return config_class
    if name in _families:
        raise ValueError(
            f"family={name} of {_origin(config_class)} is already registered by {_origin(_families[name])}; choose "
            "another name"
        )
    for member in config_class.presets:
        if (owner := _owner(member)) is not None:
            raise ValueError(
                f"model {member!r} of family={name} is already a member of family={owner}; rename it in presets, or "
                "give the class its own presets"
            )
    _families[name] = config_class
    return config_class


def unregister_family(name: str) -> None:
    """Remove a family and its members, for tests and for notebooks that define it again.

    Raises:
        ValueError: the family is unknown.
    """
    find_family(name)
    del _families[name]


def find_family(name: str) -> type[ModelConfig]:
    """Return the configuration class of a family.

    Raises:
        ValueError: the family is unknown.
    """
    if name not in _families:
        nearest = difflib.get_close_matches(name, _families, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown family {name!r}, expected one of {', '.join(_families)}{hint}")
    return _families[name]


def list_models(pattern: str = "*") -> list[str]:
    """List the names of members that match an fnmatch pattern, family by family in the order of their presets."""
    return [name for family in _families.values() for name in family.presets if fnmatch.fnmatchcase(name, pattern)]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Build the configuration of a named member.

    Args:
        name: of the member, as `list_models` gives it.
        **overrides: fields to override; a mapping overrides fields inside a nested configuration.

    Raises:
        ValueError: the name or a field is unknown, or a value is not allowed.
    """
    owner = _owner(name)
    if owner is None:
        nearest = difflib.get_close_matches(name, list_models(), n=3)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else f", expected one of {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}{hint}")
    fields = dict(_families[owner].presets[name])
    for key, value in overrides.items():
        preset = fields.get(key)
        fields[key] = {**preset, **value} if isinstance(preset, Mapping) and isinstance(value, Mapping) else value
    return _families[owner](**fields)


def build_model(config: ModelConfig) -> "nn.Module":
    """Build the network of a configuration, initialised from torch's global generator."""
    return config.build()


def _owner(member: str) -> str | None:
    """The family of a named member."""
    return next((name for name, family in _families.items() if member in family.presets), None)


def _family_of(config_class: type[ModelConfig]) -> str:
    """The name that a configuration class gives its family; ValueError for a class that is not a family."""
    name = config_class.model_fields["family"].default
    lacking = [] if isinstance(name, str) else ["a default for family"]
    lacking += [] if isinstance(getattr(config_class, "task", None), str) else ["task"]
    # A field is no attribute of its class.
    lacking += [a for a in _ANSWERS if a not in config_class.model_fields and not hasattr(config_class, a)]
    if lacking:
        raise ValueError(f"{_origin(config_class)} is not a family of networks: it lacks {', '.join(lacking)}")
    return str(name)


def _origin(config_class: type[ModelConfig]) -> str:
    return f"{config_class.__module__}.{config_class.__qualname__}"


def _validate(value: Any, info: ValidationInfo) -> ModelConfig:
    """Dispatch on `family`; pydantic merges the family's own ValidationError with its field locations."""
    name = value.get("family", DEFAULT_FAMILY) if isinstance(value, Mapping) else getattr(value, "family", None)
    if not isinstance(name, str) or name not in _families:
        raise PydanticCustomError(
            "unknown_family",
            "family must be one of {families}, not {name} (default: {default})",
            {"families": ", ".join(_families), "name": repr(name), "default": DEFAULT_FAMILY},
        )
    return _families[name].model_validate(value, context=info.context)


AnyModelConfig = Annotated[SerializeAsAny[ModelConfig], PlainValidator(_validate)]
"""Type of a field or `TypeAdapter` that reads the configuration of any registered family and writes all its fields."""

for _config_class in _BUILT_IN:
    register_family(_config_class)
