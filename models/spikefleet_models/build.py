"""Names of earlier versions for what `spikefleet_models` itself and the methods of a `ModelConfig` offer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, SerializeAsAny, Tag, TypeAdapter, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler
from torch import nn

from spikefleet_models import families, family
from spikefleet_models.detection import DetectionCriterion
from spikefleet_models.families import list_models as list_models
from spikefleet_models.retinanet_config import RetinaNetConfig
from spikefleet_models.sg_resnet_config import SGResNetConfig
from spikefleet_models.spike_yolo.config import SpikeYoloConfig, SpikingYoloV8Config

_BUILT_IN = ("sg_resnet", "spike_yolo", "spiking_yolov8", "retinanet")
_ANY: TypeAdapter[family.ModelConfig] = TypeAdapter(families.AnyModelConfig)


def _family(value: Any) -> Any:
    return value.get("family", _BUILT_IN[0]) if isinstance(value, Mapping) else getattr(value, "family", None)


def _open(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    # Locations of errors carry the family as a tag only where they always did.
    return handler(value) if _family(value) in _BUILT_IN else _ANY.validate_python(value)


ModelConfig = Annotated[
    Annotated[SGResNetConfig, Tag("sg_resnet")]
    | Annotated[SpikeYoloConfig, Tag("spike_yolo")]
    | Annotated[SpikingYoloV8Config, Tag("spiking_yolov8")]
    | Annotated[RetinaNetConfig, Tag("retinanet")],
    Discriminator(_family),
    WrapValidator(_open),
    SerializeAsAny(),
]
"""`AnyModelConfig`, with the family's name in the locations of errors."""


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """As `families.model_config`."""
    return cast(ModelConfig, families.model_config(name, **overrides))


def task_of(config: family.ModelConfig) -> Literal["classification", "detection"]:
    """`config.task`."""
    return cast(Literal["classification", "detection"], config.task)


def build_model(config: family.ModelConfig) -> nn.Module:
    """`config.build()`."""
    return config.build()


def build_criterion(config: family.ModelConfig) -> DetectionCriterion:
    """`config.build_criterion()`."""
    return config.build_criterion()
