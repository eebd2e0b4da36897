"""Names of models -> configurations -> networks and, for detectors, criteria.

Each name is one published network (README.md says how to add one); everything else about it is an override:
`model_config("sg_resnet18", num_classes=100, timesteps=2)`.
"""

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag
from torch import nn

from spikefleet_models.detection import DetectionCriterion
from spikefleet_models.retinanet import RetinaNet, RetinaNetConfig
from spikefleet_models.retinanet_loss import RetinaCriterion
from spikefleet_models.sg_resnet import SGResNet, SGResNetConfig
from spikefleet_models.spike_yolo.config import SpikeYoloConfig, SpikingYoloV8Config
from spikefleet_models.spike_yolo.loss import YoloCriterion
from spikefleet_models.spike_yolo.network import SpikeYolo
from spikefleet_models.spike_yolo.spiking_yolov8 import SpikingYoloV8

_FAMILIES: dict[str, type[SGResNetConfig | SpikeYoloConfig | SpikingYoloV8Config | RetinaNetConfig]] = {
    "sg_resnet": SGResNetConfig,
    "spike_yolo": SpikeYoloConfig,
    "spiking_yolov8": SpikingYoloV8Config,
    "retinanet": RetinaNetConfig,
}
_DEFAULT_FAMILY = "sg_resnet"


def _family(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("family", _DEFAULT_FAMILY)
    return getattr(value, "family", None)


ModelConfig = Annotated[
    Annotated[SGResNetConfig, Tag("sg_resnet")]
    | Annotated[SpikeYoloConfig, Tag("spike_yolo")]
    | Annotated[SpikingYoloV8Config, Tag("spiking_yolov8")]
    | Annotated[RetinaNetConfig, Tag("retinanet")],
    Discriminator(
        _family,
        custom_error_type="unknown_family",
        custom_error_message=f"family must be one of {', '.join(_FAMILIES)}; {_DEFAULT_FAMILY} when it is left out",
    ),
]
"""The configuration of any network; `pydantic.TypeAdapter(ModelConfig)` reads one from plain data."""

_R10: dict[str, Any] = {"stages": (1, 1, 1, 1)}
_R18: dict[str, Any] = {"stages": (2, 2, 2, 2)}
_R34: dict[str, Any] = {"stages": (3, 4, 6, 3)}
_R50: dict[str, Any] = {"stages": (3, 4, 6, 3), "block": "bottleneck"}
_SEW: dict[str, Any] = {"connection": "add", "decoder": "rate"}
_SPIKING: dict[str, Any] = {"connection": "post_add", "decoder": "rate"}
_ANN: dict[str, Any] = {"connection": "ann", "decoder": "rate", "timesteps": 1}

_YOLO: dict[str, Any] = {"family": "spike_yolo"}
_YOLO_N: dict[str, Any] = {**_YOLO, "depth": 0.33, "width": 0.375}
_YOLO_S: dict[str, Any] = {**_YOLO, "depth": 0.33, "width": 0.5}
_YOLO_M: dict[str, Any] = {**_YOLO, "depth": 0.5, "width": 0.625, "neck_ratio": 2}
_YOLO_L: dict[str, Any] = {**_YOLO, "depth": 0.5, "width": 0.75, "neck_ratio": 2}
_YOLO_TINY: dict[str, Any] = {**_YOLO, "depth": 0.1, "width": 0.0625, "stem_stride": 2, "box_channels": 16}
_RELU: dict[str, Any] = {"activation": "relu"}


def _retinanet(backbone: dict[str, Any]) -> dict[str, Any]:
    return {"family": "retinanet", "backbone": {"stem": "imagenet", **backbone}}


_PRESETS: dict[str, dict[str, Any]] = {
    # Zhang et al. 2023. R50 decodes by rate there; the others by ASD.
    "sg_resnet10": _R10,
    "sg_resnet18": _R18,
    "sg_resnet34": _R34,
    "sg_resnet50": {**_R50, "decoder": "rate"},
    # For 8x8 pictures: seconds to train on a laptop.
    "sg_resnet_tiny": {"stages": (1, 1, 1), "width": 0.5, "in_channels": 1},
    # Fang et al. 2021, ADD.
    "sew_resnet18": {**_R18, **_SEW},
    "sew_resnet34": {**_R34, **_SEW},
    "sew_resnet50": {**_R50, **_SEW},
    # Post-addition baselines.
    "spiking_resnet18": {**_R18, **_SPIKING},
    "spiking_resnet34": {**_R34, **_SPIKING},
    # ANN twins.
    "resnet18": {**_R18, **_ANN},
    "resnet34": {**_R34, **_ANN},
    "resnet50": {**_R50, **_ANN},
    # Luo et al. 2024, table 1; T = 1, D = 4.
    "spike_yolo_n": _YOLO_N,
    "spike_yolo_s": _YOLO_S,
    "spike_yolo_m": _YOLO_M,
    "spike_yolo_l": _YOLO_L,
    # For pictures of 64 to 160 pixels with small objects, strides 4, 8, 16: a step of 8 takes a quarter of a second.
    "spike_yolo_tiny": _YOLO_TINY,
    # Table 2: the same as an ANN, and the conversion of YOLOv8.
    "spike_yolo_ann_s": {**_YOLO_S, **_RELU},
    "spike_yolo_ann_tiny": {**_YOLO_TINY, **_RELU},
    "spiking_yolov8_m": {"family": "spiking_yolov8"},
    # Table 5.
    "spike_yolo_s_no_rep": {**_YOLO_S, "reparameterise": False},
    "spike_yolo_s_block2": {**_YOLO_S, "low_block": "block2"},
    "spike_yolo_s_transformer": {**_YOLO_S, "high_block": "transformer"},
    "spike_yolo_s_anchor": {**_YOLO_S, "head": "anchor"},
    # Zhang et al. 2023, detection.
    "retinanet_sg_resnet18": _retinanet(_R18),
    "retinanet_sg_resnet34": _retinanet(_R34),
    "retinanet_resnet18": _retinanet({**_R18, **_ANN}),
    "retinanet_resnet34": _retinanet({**_R34, **_ANN}),
    # For pictures of 64 to 160 pixels with small objects, strides 4, 8, 16.
    "retinanet_tiny": {
        "family": "retinanet",
        "backbone": {"stages": (1, 1, 1), "width": 0.25, "stem": "imagenet"},
        "extra_levels": 0,
        "fpn_channels": 32,
    },
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that match an fnmatch pattern, in the order of the table."""
    return [name for name in _PRESETS if fnmatch.fnmatchcase(name, pattern)]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named model with fields overridden; a mapping overrides fields inside the field.

    Raises:
        ValueError: unknown name (the sentence names the nearest), unknown field or bad value.
    """
    if name not in _PRESETS:
        nearest = difflib.get_close_matches(name, _PRESETS, n=3) or list(_PRESETS)
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(nearest)}?")
    fields = dict(_PRESETS[name])
    for key, value in overrides.items():
        preset = fields.get(key)
        fields[key] = {**preset, **value} if isinstance(preset, dict) and isinstance(value, Mapping) else value
    return _FAMILIES[fields.get("family", _DEFAULT_FAMILY)](**fields)


def task_of(config: ModelConfig) -> Literal["classification", "detection"]:
    """What the networks of a configuration's family are trained for."""
    return "classification" if isinstance(config, SGResNetConfig) else "detection"


def build_model(config: ModelConfig) -> nn.Module:
    """The network of a configuration, freshly initialised from torch's global generator."""
    if isinstance(config, SpikeYoloConfig):
        return SpikeYolo(config)
    if isinstance(config, SpikingYoloV8Config):
        return SpikingYoloV8(config)
    if isinstance(config, RetinaNetConfig):
        return RetinaNet(config)
    return SGResNet(config)


def build_criterion(config: ModelConfig) -> DetectionCriterion:
    """What turns a detector's outputs into a loss and into detections.

    Raises:
        ValueError: the network classifies pictures, or it is the anchor variant, whose loss was not published.
    """
    if isinstance(config, RetinaNetConfig):
        return RetinaCriterion(config.criterion, config.num_classes, config.strides)
    if isinstance(config, SGResNetConfig):
        raise ValueError(f"family={config.family} classifies pictures; only detectors have a detection criterion")
    if isinstance(config, SpikeYoloConfig) and config.head == "anchor":
        raise ValueError("head='anchor' has no published loss, and none here; use head='anchor_free' to train")
    return YoloCriterion(config.criterion, config.num_classes, config.strides)
